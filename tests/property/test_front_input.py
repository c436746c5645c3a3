"""Invariants tested: no line, file or text breaks the front of QEMU; its relay loses, doubles and moves nothing."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.errors import MachineDied
from emulator.front.boot_files import shown_to_firmware
from emulator.front.channels import Client
from emulator.front.command_line import LeftToQemu, Plan, read
from emulator.front.registers import differences, reset_state
from emulator.front.relay import SEV_COMMANDS, Message, Relay
from emulator.qmp_json import JsonStream, Stray, Value
from tests.support.qmp_inputs import MALFORMED, NO_JSON
from tests.support.real_qemu import small_kernel

words = st.sampled_from(
    [
        *(
            "-machine",
            "-M",
            "-object",
            "-qmp",
            "-mon",
            "-chardev",
            "-m",
            "-accel",
            "-enable-kvm",
            "-S",
            "-cpu",
            "-numa",
        ),
        *("-kernel", "-append", "-initrd", "-daemonize", "-pidfile", "--qmp-pretty", "-id", "-mem-path", "-", "--", ""),
        "q35,confidential-guest-support=sev0",
        "memory-encryption=sev0,accel=kvm:tcg,memory-backend=m,max-ram-below-4g=1G",
        "sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=5",
        '{"qom-type": "sev-guest", "id": "sev0", "reduced-phys-bits": 1}',
        '{"qom-type": ["x"], "id": {}}',
        "memory-backend-ram,id=m,size=64M",
        "node,memdev=m",
        "unix:p,server=on,wait=off",
        "tcp:[::1]:70000,server",
        "socket,id=c,path=p,reconnect=99999999999999999999",
        "chardev=c,mode=control",
        "chardev:c",
        "size=99999999999999999999999G",
        "kvm",
    ]
)
texts = st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " \0\udc80ä²", max_size=40)


@settings(max_examples=300, deadline=None)
@given(line=st.lists(words | texts, max_size=12))
def test_any_line_is_a_plan_or_qemus_own_or_an_end(line: list[str]) -> None:
    sev = ["-machine", "q35,confidential-guest-support=sev0", "-object", "sev-guest,id=sev0,reduced-phys-bits=1"]
    for given_words in (line, [*sev, *line]):
        try:
            outcome: object = read(given_words)
        except (LeftToQemu, MachineDied) as end:
            outcome = end
        if isinstance(outcome, Plan):
            assert outcome.ram > 0
        else:
            assert outcome.lines if isinstance(outcome, MachineDied) else isinstance(outcome, LeftToQemu)


@settings(deadline=None)
@given(
    noise=st.binary(max_size=700),
    append=st.binary(max_size=40) | st.from_regex(rb"(x?vga=[0-9a-fx]{0,12} ?)+", fullmatch=True),
    initrd=st.none() | st.integers(0, 1 << 40),
    low_ram=st.integers(0, 1 << 33),
)
def test_any_kernel_is_shown_with_as_many_bytes(noise: bytes, append: bytes, initrd: int | None, low_ram: int) -> None:
    kernel = small_kernel()
    for file in (noise, noise[:0x1F0].ljust(0x1F0, b"\0") + kernel[0x1F0:], kernel[: len(noise)]):
        shown = shown_to_firmware(file, initrd=initrd, append=append, low_ram=low_ram)
        assert len(shown) == len(file)
        assert shown[:0x1FA] == file[:0x1FA]
        assert shown[0x238:] == file[0x238:]


LINES = st.sampled_from(
    [
        "EAX=00000000 EBX=00000000 ECX=00000000 EDX=00830f10",
        "EIP=0000fff0 EFL=00000002 [-------] CPL=0",
        *(
            f"{name}=0000 00000000 0000ffff 00009300"
            for name in ("ES ", "CS ", "SS ", "DS ", "FS ", "GS ", "LDT", "TR ")
        ),
        *(f"{name}=     00000000 0000ffff" for name in ("GDT", "IDT")),
        "CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000",
        "DR6=00000000ffff0ff0 DR7=0000000000000400",
        "EFER=0000000000000000",
        "FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80",
    ]
)


@settings(deadline=None)
@given(lines=st.lists(LINES | texts, max_size=40))
def test_any_text_is_a_reset_state_or_an_end(lines: list[str]) -> None:
    try:
        state = reset_state("\n".join(lines))
    except MachineDied:
        return
    assert all(isinstance(line, str) for line in differences(bytes(4096), state))


class Launch:
    """The other side of the relay: what it was asked, in order."""

    def __init__(self) -> None:
        self.runs = False
        self.asked: list[str] = []

    async def finish(self) -> bool:
        self.runs = True
        return True

    async def answer(self, command: str, arguments: Message, reply: Message) -> Message:  # noqa: ARG002 -- its shape
        self.asked.append(command)
        return {"return": {"ours": command}}


MARKED = re.compile(rb'"id": "(sevattest-[0-9a-f]{16})"')


async def relayed(pieces: list[bytes]) -> tuple[bytes, bytes, Launch]:
    """What a machine that answers nothing but what is marked hears, and what its client hears."""
    launch = Launch()
    ends = [socket.socketpair() for _ in range(2)]
    (client, near), (machine, far) = [[await asyncio.open_connection(sock=end) for end in pair] for pair in ends]
    heard = bytearray()

    async def be_the_front() -> None:
        await Relay(launch, Client(*near), Client(*machine), pretty=False).run()
        near[1].close()

    async def be_the_machine() -> None:
        answered = 0
        while data := await far[0].read(1 << 16):
            heard.extend(data)
            marks = MARKED.findall(heard)
            for mark in marks[answered:]:
                far[1].write(b'{"return": {}, "id": "%s"}\r\n' % mark)
            answered = len(marks)
        far[1].close()

    async def be_the_client() -> bytes:
        for piece in pieces:
            client[1].write(piece)
            await client[1].drain()
            await asyncio.sleep(0)
        client[1].write_eof()
        return await client[0].read()

    said, *_ = await asyncio.gather(be_the_client(), be_the_front(), be_the_machine())
    for writer in (client[1], machine[1]):
        writer.close()
    return bytes(heard), said, launch


COMMANDS = [
    b'{"execute": "query-sev"}',
    b"{'execute': 'query-sev', 'id': {'a': [1]}}",
    b'{"execute": "sev-inject-launch-secret", "arguments": {"packet-header": "{", "secret": "}"}}',
    b'{"execute": "cont"}',
    b'{"execute": "cont", "id": 1}',
]
said = st.sampled_from(
    [*COMMANDS, *(item for item in [*NO_JSON, *MALFORMED] if len(item) < 200), b" ", b"\n", b"\r\n\t"]
)


@settings(max_examples=150, deadline=None)
@given(items=st.lists(said | st.binary(max_size=12), max_size=10), cuts=st.lists(st.integers(1, 30), min_size=1))
def test_every_byte_that_is_no_command_of_ours_is_passed_on_once_and_in_order(
    items: list[bytes], cuts: list[int]
) -> None:
    whole = b"".join(items)
    pieces, at, turn = [], 0, 0
    while at < len(whole):
        pieces.append(whole[at : at + cuts[turn % len(cuts)]])
        at, turn = at + len(pieces[-1]), turn + 1
    heard, answers, launch = asyncio.run(asyncio.wait_for(relayed(pieces), 30))

    # The same by hand: whole values, and where they end.
    stream, expected, begin, runs = JsonStream(), bytearray(), 0, False
    ours: list[str] = []
    for found in stream.feed(whole):
        raw, begin = whole[begin : stream.consumed], stream.consumed
        name = command_in(found)
        if name in SEV_COMMANDS:
            ours.append(name)
            expected += raw[: raw.index(b"{")] + b"<ours>"
        elif name == "cont" and not runs:
            runs = True
            # A question of ours stands before it, and blanks before that.
            expected += raw[: raw.index(b"{")] + b"<ours>" + raw[raw.index(b"{") :]
        else:
            expected += raw
    expected += whole[begin:]
    assert QUESTION.sub(b"<ours>", heard) == expected
    assert (launch.asked, launch.runs) == (ours, runs)
    assert [json.loads(line)["return"]["ours"] for line in answers.splitlines()] == ours


# One that the relay wrote: at most one level of arguments, and no brace in them but whole strings.
QUESTION = re.compile(rb'\{"execute": (?:[^{}"]|"[^"]*"|\{(?:[^{}"]|"[^"]*")*\})*"id": "sevattest-[0-9a-f]{16}"\}\r\n')


def command_in(found: Value | Stray) -> str:
    """The command's name, if QEMU may have no complaint about how it is written."""
    value = found.value if isinstance(found, Value) else None
    if not isinstance(value, dict) or set(value) - {"execute", "arguments", "id"}:
        return ""
    name, arguments = value.get("execute"), value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict) or (name == "cont" and arguments):
        return ""
    return name if all(isinstance(text, str | int) for text in arguments.values()) else ""
