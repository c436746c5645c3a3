"""A program in QEMU's place that misbehaves on request: the hostile half of the agent's tests.

    python fake_qemu.py SCRIPT QEMU'S-ARGUMENTS…

SCRIPT is a JSON file, read again for every command, so that a test can change its mind. Everything that arrives is
noted in SCRIPT.journal, one JSON value a line; the first line is the command line, files and environment it was started
with. Without further instructions it behaves like a paused QEMU 7.2 with an SEV guest in launch-secret.

Keys of the script:
    die        {stderr, code}: say it and end before there is a socket
    mute       make a socket, greet nobody ("silence"), hang up on everybody ("close"), or send nonsense ("garbage")
    no_socket  never make the socket
    stubborn   ignore SIGTERM
    child      leave a child behind that ignores SIGTERM
    noise      bytes to write to stderr at the start
    sev, run   members of query-sev and query-status to replace
    blob       answer to query-sev-launch-measure, base64
    report     answer to query-sev-attestation-report, base64
    on         command -> list of actions, one for each time that it comes; then it is done as usual
Actions: {do: …, effect: whether the command takes effect first}
    (in a text, $ID is the command's id)
    error {desc}, close, cut, die {stderr}, silence, events {count}, wrong_id, text {text}, long {size}, deep, split,
    twice, wait {file}
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_GREETING = {
    "QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"}, "capabilities": ["oob"]}
}
_EVENT = {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RTC_CHANGE", "data": {"offset": 0}}
_QEMU = "qemu-system-x86_64: "


class FakeQemu:
    """The program."""

    def __init__(self, script: Path, words: list[str]) -> None:
        self._script_file = script
        self._words = words
        self._resumed = False
        self._spent: dict[str, int] = {}

    @property
    def _script(self) -> dict[str, Any]:
        script: dict[str, Any] = json.loads(self._script_file.read_text(encoding="utf-8"))
        return script

    def run(self) -> NoReturn:
        """Serve clients, one after the other, until somebody ends it."""
        script = self._script
        files = {path.name: path.read_text("ascii") for path in Path().glob("*.b64")}
        modes = {path.name: oct(path.stat().st_mode) for path in [*Path().glob("*.b64"), Path()]}
        self._note({"argv": self._words, "files": files, "modes": modes, "environ": dict(os.environ)})
        if noise := script.get("noise"):
            sys.stderr.write(("x" * 99 + "\n") * (noise // 100 + 1))
            sys.stderr.flush()
        if script.get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if script.get("child"):
            child = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 60; done"])
            self._note({"child": child.pid})
        if died := script.get("die"):
            self._die(died)
        if script.get("no_socket"):
            signal.pause()
        address = self._words[self._words.index("-qmp") + 1].removeprefix("unix:").split(",")[0]
        Path(address).unlink(missing_ok=True)  # as QEMU does
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(address)
            server.listen(1)
            self._note({"listening": True})
            while True:
                client, _ = server.accept()
                with client:
                    try:
                        self._serve(client)
                    except OSError:
                        continue

    def _serve(self, client: socket.socket) -> None:
        mute = self._script.get("mute")
        if mute == "close":
            return
        if mute == "silence":
            while client.recv(4096):
                pass
            return
        if mute == "garbage":
            client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            return
        self._send(client, _GREETING)
        text, decoder = "", json.JSONDecoder()
        while True:
            data = client.recv(65536)
            if not data:
                return
            text += data.decode()
            while text.strip():
                try:
                    message, end = decoder.raw_decode(text.lstrip())
                except json.JSONDecodeError:
                    break
                text = text.lstrip()[end:]
                if not self._answer(client, message):
                    return

    def _answer(self, client: socket.socket, message: dict[str, Any]) -> bool:
        """Answer one command; False to hang up."""
        command, number = message["execute"], message.get("id")
        self._note({key: message[key] for key in ("execute", "arguments") if key in message})
        actions = self._script.get("on", {}).get(command, [])
        spent = self._spent.get(command, 0)
        if spent >= len(actions):
            self._send(client, {"return": self._do(client, command), "id": number})
            return True
        self._spent[command] = spent + 1
        return self._misbehave(client, command, number, actions[spent])

    def _misbehave(  # noqa: C901, PLR0912 -- one case for each way to misbehave
        self, client: socket.socket, command: str, number: object, action: dict[str, Any]
    ) -> bool:
        value = self._do(client, command) if action.get("effect") else {}
        reply = {"return": value, "id": number}
        match action["do"]:
            case "error":
                self._send(client, {"id": number, "error": {"class": "GenericError", "desc": action["desc"]}})
            case "close":
                return False
            case "die":
                self._die(action)
            case "silence":
                pass
            case "events":
                for _ in range(action["count"]):
                    self._send(client, _EVENT)
                self._send(client, {"return": self._do(client, command), "id": number})
            case "wrong_id":
                self._send(client, {**reply, "id": "somebody-else"})
            case "text":
                client.sendall(action["text"].replace("$ID", str(number)).encode() + b"\r\n")
            case "long":
                self._send(client, {**reply, "return": "x" * action["size"]})
            case "deep":
                client.sendall(b"[" * 100_000 + b"]" * 100_000 + b"\r\n")
            case "cut":
                whole_line = json.dumps({"return": value, "id": number}).encode()
                client.sendall(whole_line[: len(whole_line) // 2])
                return False
            case "split":
                whole = json.dumps({"return": self._do(client, command), "id": number}).encode() + b"\r\n"
                for at in range(len(whole)):
                    client.sendall(whole[at : at + 1])
            case "wait":
                while not Path(action["file"]).exists():
                    time.sleep(0.01)
                self._send(client, {"return": self._do(client, command), "id": number})
            case "twice":
                whole_reply = {"return": self._do(client, command), "id": number}
                self._send(client, whole_reply)
                self._send(client, whole_reply)
        return True

    def _do(self, client: socket.socket, command: str) -> object:
        script = self._script
        if command == "query-status":
            status = "running" if self._resumed else "prelaunch"
            return {"status": status, "singlestep": False, "running": self._resumed, **script.get("run", {})}
        if command == "query-sev":
            return {
                "enabled": True,
                "api-major": 1,
                "api-minor": 55,
                "build-id": 24,
                "policy": self._policy(),
                "state": "running" if self._resumed else "launch-secret",
                "handle": 1,
                **script.get("sev", {}),
            }
        if command == "query-sev-launch-measure":
            return {"data": script.get("blob", base64.b64encode(bytes(range(48))).decode())}
        if command == "query-sev-attestation-report":
            return {"data": script.get("report", base64.b64encode(bytes(208)).decode())}
        if command == "cont" and not self._resumed:
            self._resumed = True
            self._send(client, {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"})
        return {}

    def _policy(self) -> int:
        word = next(word for word in self._words if word.startswith("sev-guest,"))
        return int(next(part for part in word.split(",") if part.startswith("policy="))[7:], 16)

    def _send(self, client: socket.socket, message: object) -> None:
        client.sendall(json.dumps(message).encode() + b"\r\n")

    def _note(self, entry: object) -> None:
        with self._script_file.with_suffix(".journal").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")

    def _die(self, last: dict[str, Any]) -> NoReturn:
        for line in last.get("stderr", "").splitlines():
            sys.stderr.write(f"{_QEMU}{line}\n")
        sys.stderr.flush()
        os._exit(last.get("code", 1))


if __name__ == "__main__":
    FakeQemu(Path(sys.argv[1]), sys.argv[2:]).run()
