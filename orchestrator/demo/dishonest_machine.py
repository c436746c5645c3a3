"""A host that starts the guest under its own terms: the program of `sevattest demo --tamper=policy`.

Stands where the guest's definition names QEMU. Drops the guest owner's session from the command line and clears NODBG
in the guest policy, so that the platform's firmware makes keys of its own, measures the guest under them, and would let
the host read the guest's memory. Then stands between the machine and whoever speaks QMP to it, and says that the policy
is what was asked for: the agent must not notice, the verifier must.

Runs by path, without this distribution's packages.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import sys
from pathlib import Path

NODBG = 0x1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LINE_LIMIT = 1 << 20


def reworded(words: list[str]) -> list[str]:
    """QEMU's arguments with the sev-guest object under the host's terms.

    Args:
        words: the arguments that the agent wrote, policy in decimal or 0x form.
    """
    return [
        _reworded_object(word) if word.startswith("sev-guest,") and before == "-object" else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def _reworded_object(text: str) -> str:
    kept = []
    for prop in text.split(","):
        name, _, value = prop.partition("=")
        if name in {"dh-cert-file", "session-file"}:
            continue
        kept.append(f"policy={int(value, 0) & ~NODBG:#x}" if name == "policy" else prop)
    return ",".join(kept)


def behind(words: list[str]) -> tuple[list[str], Path, Path]:
    """The arguments with the machine's QMP socket moved aside; where it was to be, and where it is.

    Raises:
        ValueError: there is no `-qmp unix:PATH`.
    """
    at = words.index("-qmp") + 1
    path, comma, options = words[at].removeprefix("unix:").partition(",")
    # Beside it and shorter: a socket's path has at most 107 bytes.
    hidden = Path(path).with_name("m")
    return [*words[:at], f"unix:{hidden}{comma}{options}", *words[at + 1 :]], Path(path), hidden


def denied(line: bytes) -> bytes:
    """A line of the machine's as the agent is to read it: with the policy that was asked for."""
    try:
        message = json.loads(line)
        message["return"]["policy"] |= NODBG
    except (ValueError, TypeError, KeyError):
        return line
    return json.dumps(message).encode() + b"\r\n"


async def _pass_on(questions: asyncio.StreamReader, machine: asyncio.StreamWriter) -> None:
    """What the agent sends, as it comes: QMP ends its messages where the JSON does, not with a line."""
    while data := await questions.read(_LINE_LIMIT):
        machine.write(data)
        await machine.drain()
    machine.write_eof()


async def _deny(answers: asyncio.StreamReader, agent: asyncio.StreamWriter) -> None:
    """What the machine answers, line by line."""
    while line := await answers.readline():
        agent.write(denied(line))
        await agent.drain()
    agent.write_eof()


async def _run(words: list[str]) -> int:
    words, visible, hidden = behind(reworded(words))
    machine = await asyncio.create_subprocess_exec(*words, preexec_fn=_die_with_parent)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                answers, questions = await asyncio.open_unix_connection(str(hidden), limit=_LINE_LIMIT)
                break
            except OSError:
                await asyncio.sleep(0.01)  # it is not up yet; when it never is, we end with it
        # Either side may hang up at any moment.
        await asyncio.gather(_pass_on(reader, questions), _deny(answers, writer), return_exceptions=True)
        for side in (questions, writer):
            side.close()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, machine.terminate)
    async with await asyncio.start_unix_server(serve, str(visible), limit=_LINE_LIMIT):
        return await machine.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(asyncio.run(_run(sys.argv[1:])))
