"""The stand-in's monitor against recordings of real QEMU (tests/vectors/qmp/README.md): the same bytes or words.

Of the recordings, every line counts that is about JSON, about negotiation, or about a command that the stand-in has.
Replies that depend on how QEMU was built (its package, hundreds of CPU properties) are compared in what the stand-in
also says.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from emulator.machine import Machine
from emulator.qemu_options import MachineOptions, parse
from emulator.qmp_commands import Commands, Session
from emulator.qmp_json import JsonStream, Value, dump
from emulator.sev_launch import Processor

FOLDER = Path(__file__).resolve().parents[2] / "vectors" / "qmp"
VERSIONS = ("7.2", "10.0")
# Commands that QEMU has and the stand-in has not: recorded, but not ours.
NOT_OURS = re.compile(
    rb"query-(machines|uuid|name|memory-size-summary|block|qmp-schema|commands|kvm|cpus-fast)|qom-|system_powerdown"
)


class Step(NamedTuple):
    """What a client sent, and the lines that came back."""

    sent: bytes
    received: list[bytes]


def steps(version: str) -> Iterator[Step]:
    """The first client's conversation, without lines that the recording cut."""
    step: Step | None = None
    for line in (FOLDER / f"qmp-transcript-qemu{version}.txt").read_text().splitlines():
        found = re.match(r"(?:A|B|Cc) ([<>]) (b['\"].*)$", line)
        if found is None:
            continue
        direction, text = found.groups()
        if direction == ">":
            if step:
                yield step
            step = None if "...[" in text else Step(ast.literal_eval(text), [])
        elif step:
            cut = text.split("' ...[")[0]
            step.received.append(cut.encode() if cut != text else ast.literal_eval(text))
    if step:
        yield step


class Monitor:
    """The stand-in's monitor without a socket."""

    def __init__(self, version: str, options: MachineOptions | None = None) -> None:
        options = options or MachineOptions(vcpus=2, memory=256 << 20, cpu="EPYC-Rome", paused=True)
        processor = Processor(generation="rome", cbitpos=47)
        self.machine = Machine(options, platform=Path("/nowhere"), processor=processor, flavour="legacy")
        self.ended = False
        self.commands = Commands(self.machine, version, self._end)
        self.session = Session()
        self.stream = JsonStream()
        self.lines: list[bytes] = []
        self.machine.emit = self._emit
        self.machine.schedule = self._forget

    def say(self, data: bytes) -> list[bytes]:
        self.lines = []
        for found in self.stream.feed(data):
            if isinstance(found, Value):
                self.lines.append(dump(self.commands.dispatch(self.session, found.value)))
            else:
                self.lines.append(dump({"error": {"class": "GenericError", "desc": found.text}}))
        return self.lines

    def reconnect(self) -> list[bytes]:
        self.session, self.stream = Session(), JsonStream()
        return [dump(self.commands.greeting())]

    def _forget(self, boot: object) -> None:
        """The guest does not boot: nobody looks at it here."""

    def _end(self) -> None:
        self.ended = True

    def _emit(self, name: str, data: dict[str, object] | None) -> None:
        event: dict[str, Any] = {"timestamp": {}, "event": name}
        self.lines.append(dump(event | ({"data": data} if data else {})))


def comparable(line: bytes, said: bytes) -> tuple[object, object]:
    """Both lines without what may differ between two builds of QEMU."""
    theirs, ours = json.loads(line), json.loads(said)
    for message in (theirs, ours):
        message.pop("timestamp", None)
        if isinstance(message.get("return"), dict):
            message["return"].pop("package", None)
        message.get("QMP", {}).get("version", {}).pop("package", None)
    model = theirs.get("return", {}).get("model") if isinstance(theirs.get("return"), dict) else None
    if model:
        known = ours["return"]["model"]["props"]
        model["props"] = {name: value for name, value in model["props"].items() if name in known}
    return theirs, ours


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_answers_as_qemu_did(version: str) -> None:
    monitor = Monitor(version)
    compared = 0
    for step in steps(version):
        if NOT_OURS.search(step.sent) or b"query-sev-capabilities" in step.sent:
            continue  # the recorded QEMU had no KVM, the stand-in always has
        received = [line for line in step.received if line.endswith(b"\r\n")]
        if not received:
            monitor.say(step.sent)
            continue  # cut by the recording, or nothing came
        # The recording's second and third clients were greeted when the one before them left.
        waited = monitor.reconnect() if received[0].startswith(b'{"QMP"') else []
        said = waited + monitor.say(step.sent)
        if not waited and any(line.startswith(b'{"QMP"') for line in received):
            said += monitor.reconnect()
        assert len(said) >= len(received), step
        for line, ours in zip(received, said, strict=False):
            if b'"package"' in line or b'"timestamp"' in line or b'"model"' in line:
                theirs, mine = comparable(line, ours)
                assert mine == theirs
            else:
                assert ours == line
            compared += 1
    assert compared >= 50
    assert monitor.ended


@pytest.mark.parametrize("version", VERSIONS)
def test_the_greeting_names_the_version_and_the_same_capabilities(version: str) -> None:
    text = (FOLDER / f"qmp-transcript-qemu{version}.txt").read_text()
    recorded = re.search(r"^A < (b'.\"QMP\".*)$", text, re.MULTILINE)
    assert recorded
    theirs, ours = json.loads(ast.literal_eval(recorded[1])), Monitor(version).commands.greeting()
    del theirs["QMP"]["version"]["package"]
    assert isinstance(ours["QMP"], dict)
    assert ours["QMP"]["version"].pop("package") == "sevattest stand-in"
    assert ours == theirs


def test_eleven_hundred_brackets_are_a_thousand_errors() -> None:
    # The recording: "JSON nesting depth limit exceeded", then one line for each bracket that is left over, 1027 in all.
    monitor = Monitor("7.2")
    nested = b'{"execute":"query-status","id":' + b"[" * 1100 + b"]" * 1100 + b"}\n"
    lines = [json.loads(line)["error"]["desc"] for line in monitor.say(nested)]
    assert len(nested) == 2233
    assert lines[:4] == [
        "JSON nesting depth limit exceeded",
        "QMP input must be a JSON object",
        "JSON parse error, expecting value",
        "JSON parse error, expecting value",
    ]
    assert len(lines) == 1027


@pytest.mark.parametrize("kind", ["static", "full"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_cpu_model_has_the_numbers_of_the_recording(version: str, kind: str) -> None:
    # cpu-model-expansion-EPYC-Rome-*.json: family 23, model 49, stepping 0 in all four.
    monitor = Monitor(version)
    monitor.say(b'{"execute":"qmp_capabilities"}')
    request = {"execute": "query-cpu-model-expansion", "arguments": {"type": kind, "model": {"name": "EPYC-Rome"}}}
    (line,) = monitor.say(json.dumps(request).encode())
    model = json.loads(line)["return"]["model"]
    assert model["name"] == ("base" if kind == "static" else "EPYC-Rome")
    props = model["props"]
    assert (props["family"], props["model"], props["stepping"], props["vendor"]) == (23, 49, 0, "AuthenticAMD")
    assert (props["min-level"], props["model-id"]) == (13, "AMD EPYC-Rome Processor")


ES_GUEST = ["-object", "sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=5"]
INJECT, EXPAND = "sev-inject-launch-secret", "query-cpu-model-expansion"
PACKET = {"packet-header": "", "secret": ""}


@pytest.mark.parametrize(
    ("command", "arguments", "desc"),
    [
        (INJECT, PACKET | {"secret": 1}, "Invalid parameter type for 'secret', expected: string"),
        (INJECT, PACKET | {"gpa": True}, "Parameter 'gpa' expects uint64"),
        (INJECT, PACKET | {"gpa": 1.5}, "Parameter 'gpa' expects uint64"),
        (INJECT, PACKET | {"gpa": 1 << 64}, "Parameter 'gpa' expects uint64"),
        (EXPAND, {"model": {}}, "Parameter 'type' is missing"),
        (EXPAND, {"type": "full"}, "Parameter 'model' is missing"),
        (EXPAND, {"type": "x", "model": {}}, "Parameter 'type' does not accept value 'x'"),
        (EXPAND, {"type": "full", "model": 1}, "Invalid parameter type for 'model', expected: object"),
        (EXPAND, {"type": "full", "model": {}}, "Parameter 'model.name' is missing"),
        (EXPAND, {"type": "full", "model": {"name": "EPYC", "x": 1}}, "Parameter 'model.x' is unexpected"),
        ("qmp_capabilities", {}, "Capabilities negotiation is already complete, command ignored"),
    ],
)
def test_wrong_arguments_are_refused_in_qemus_words(command: str, arguments: dict[str, Any], desc: str) -> None:
    monitor = Monitor("7.2")
    monitor.say(b'{"execute":"qmp_capabilities"}')
    (line,) = monitor.say(json.dumps({"execute": command, "arguments": arguments, "id": [1]}).encode())
    assert json.loads(line)["error"]["desc"] == desc
    assert line.startswith(b'{"id": [1], "error": ')


def test_out_of_band_is_a_member_once_it_was_enabled() -> None:
    monitor = Monitor("7.2")
    enable = b'{"execute":"qmp_capabilities","arguments":{"enable":["%s"]}}'
    assert b"does not accept value 'no'" in monitor.say(enable % b"no")[0]
    assert monitor.say(enable % b"oob") == [b'{"return": {}}\r\n']
    assert b"The command cont does not support OOB" in monitor.say(b'{"exec-oob":"cont"}')[0]
    assert b"clashes" in monitor.say(b'{"exec-oob":"cont","execute":"cont"}')[0]


@pytest.mark.parametrize("words", [["-no-reboot"], ["-machine", "q35,confidential-guest-support=sev0", *ES_GUEST]])
def test_a_guest_that_cannot_be_reset_ends(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor("7.2", parse(words))
    monitor.say(b'{"execute":"qmp_capabilities"}')
    event, reply = monitor.say(b'{"execute":"system_reset"}')
    assert json.loads(event) == {
        "timestamp": {},
        "event": "SHUTDOWN",
        "data": {"guest": False, "reason": "host-qmp-system-reset"},
    }
    assert reply == b'{"return": {}}\r\n'
    assert monitor.ended
    told = "" if "-no-reboot" in words else "qemu-system-x86_64: cpus are not resettable, terminating\n"
    assert capsys.readouterr().err == told
