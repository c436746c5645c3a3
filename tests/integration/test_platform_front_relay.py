"""The front's conversation held against a real QEMU's own: the same bytes in, the same bytes out.

The oracle is a plain machine of the same QEMU with the same devices and no SEV. Whatever a client says, and in whatever
pieces, both must answer alike, but for what only SEV can answer.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from emulator.firmware_image import SECRET_AREA
from tests.support.agent import open_descriptors
from tests.support.eventually import wait_until
from tests.support.fw_cfg import read_memory
from tests.support.platform import Platform
from tests.support.qmp import TIMEOUT, QmpClient, running_machine
from tests.support.qmp_inputs import MALFORMED, NO_JSON, ODD_IDS
from tests.support.real_qemu import EACH_QEMU, qemu, version_of
from tests.support.sev_host import TEXT, Host, b64, blob_of, guests, make_host, packet_for, wait_for_guests

__all__ = ["qemu"]  # a fixture
TRANSCRIPTS = Path(__file__).resolve().parents[1] / "vectors" / "qmp"
INJECT = "sev-inject-launch-secret"
CAPABILITIES = b'{"execute": "qmp_capabilities"}'
FENCE = b'\xff\n{"execute": "query-version", "id": "fence"}\n'
# What two processes cannot have alike, and what only one of them has.
VARIES = re.compile(rb'"(?:seconds|microseconds|thread-id|pid)": \d+|unix:[^"]*|/[^" ]*/')


class Pair:
    """The same machine twice: a host's, behind the front, and a plain one."""

    def __init__(self, host: Host, plain: Path) -> None:
        self.host = host
        self.plain = plain

    def conversations(self, pieces: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """What both say to a client that sends these pieces and a last question."""
        return conversation(self.host.qmp, pieces), conversation(self.plain, pieces)


def plain_arguments(host: Host, qmp: Path, *more: str) -> list[str]:
    """The same machine without SEV."""
    given = host.arguments(*more)
    at = given.index("-object")
    words = [*given[:at], *given[at + 2 :], "-accel", "tcg", "-display", "none"]
    words[words.index("-machine") + 1] = "q35"
    words[words.index("-qmp") + 1] = f"unix:{qmp},server=on,wait=off"
    words[words.index("-serial") + 1] = "null"
    return words


@contextlib.contextmanager
def running_pair(folder: Path, platform: Platform, qemu: str, *more: str, policy: int = 0xB) -> Iterator[Pair]:
    host = make_host(folder, platform, policy)
    plain = folder / "plain"
    front = [*platform.front(qemu), *host.arguments(*more, "-display", "none")]
    front[front.index("-serial") + 1] = "null"
    with running_machine(front, host.qmp), running_machine([qemu, *plain_arguments(host, plain, *more)], plain):
        yield Pair(host, plain)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, platform: Platform, qemu: str) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("pair"), platform, qemu, "-cpu", "EPYC-Rome", "-smp", "2") as both:
        yield both


def conversation(path: Path, pieces: Sequence[bytes]) -> list[bytes]:
    """Every line that a client hears, with what varies blotted out."""
    with QmpClient(path) as client:
        for piece in pieces:
            client.send(piece)
        client.send(FENCE)
        lines = [client.line()]
        while b'"fence"' not in lines[-1]:
            assert lines[-1], lines
            lines.append(client.line())
    return [VARIES.sub(b"#", line) for line in lines]


@EACH_QEMU
@pytest.mark.parametrize("negotiated", [True, False])
def test_what_is_no_command_is_answered_as_by_qemu(pair: Pair, *, negotiated: bool) -> None:
    start = CAPABILITIES if negotiated else b""
    for said in [*NO_JSON, *MALFORMED]:
        front, plain = pair.conversations([start, said])
        assert front == plain, said
        assert len(plain) > negotiated + 1 or said == b"\n", said


@EACH_QEMU
def test_any_json_is_echoed_as_an_id_whoever_answers(pair: Pair) -> None:
    for identity in ODD_IDS:
        for command in (b"query-name", b"query-sev-attestation-report", b"nope"):
            said = b'{"execute": "%s", "id": %s}' % (command, identity)
            front, plain = pair.conversations([CAPABILITIES, said])
            assert front == plain, said
        with QmpClient(pair.host.qmp) as client:
            client.negotiate()
            client.send(b'{"execute": "query-name", "id": %s}{"execute": "query-sev", "id": %s}' % (identity, identity))
            theirs, ours = client.line(), client.line()
            assert theirs.partition(b', "id"')[2] == ours.partition(b', "id"')[2] != b""


@EACH_QEMU
def test_the_recorded_conversation_is_the_same_in_any_pieces(pair: Pair, qemu: str) -> None:
    name = "qmp-transcript-qemu10.0.txt" if version_of(qemu) >= (9, 1) else "qmp-transcript-qemu7.2.txt"
    said = []
    for line in (TRANSCRIPTS / name).read_text().splitlines():
        found = re.match(r"A > (b['\"].*)$", line)
        if found and "...[" not in line and "quit" not in line:
            said.append(ast.literal_eval(found[1]))
    # What SEV answers otherwise, and what has other values in each process.
    only_sev = re.compile(
        rb'"query-sev|"secret": "AAAA"|packet-header|mnonce|query-(chardev|memdev|uuid|block)|qom-list|"cont"|"stop"'
        rb"|system_(reset|powerdown)"
    )
    said = [line for line in said if not only_sev.search(line)]
    assert len(said) > 30
    whole = b"".join(said)
    assert pair.conversations(said)[0] == pair.conversations(said)[1]
    front, plain = pair.conversations([whole])
    assert front == plain
    assert pair.conversations([whole[at : at + 1] for at in range(len(whole))])[0] == plain
    assert pair.conversations([whole[at : at + 37] for at in range(0, len(whole), 37)])[0] == plain


@EACH_QEMU
def test_commands_in_one_write_are_answered_in_their_order(pair: Pair) -> None:
    commands = [
        b"query-name",
        b"query-sev",
        b"nope",
        b"query-sev-launch-measure",
        b"query-status",
        b"query-sev-capabilities",
    ]
    said = b"".join(b'{"execute": "%s", "id": %d}' % (name, at) for at, name in enumerate(commands * 5))
    front, plain = pair.conversations([CAPABILITIES + said])
    for lines in (front, plain):
        identities = [json.loads(line)["id"] for line in lines[2:-2]]
        assert identities == list(range(30))
    for ours, theirs, name in zip(front[2:], plain[2:], commands * 5, strict=False):
        assert (ours == theirs) == (b"sev" not in name)


@EACH_QEMU
def test_a_pretty_monitor_is_as_pretty_as_qemus(tmp_path: Path, platform: Platform, qemu: str) -> None:
    host = make_host(tmp_path, platform, 0xB)
    plain = tmp_path / "plain"
    front_words = [*platform.front(qemu), *host.arguments("-display", "none")]
    plain_words = [qemu, *plain_arguments(host, plain)]
    for words in (front_words, plain_words):
        words[words.index("-qmp")] = "-qmp-pretty"
        words[words.index("-serial") + 1] = "null"

    def heard(path: Path) -> bytes:
        said = [
            b'{"execute": "query-status", "id": {"a": [1, {}, []]}}',
            b'{"execute": "query-sev", "id": {"a": [1, {}, []]}}',
        ]
        said += [
            b'{"execute": "query-sev", "arguments": {"x": 1}}',
            b'{"execute": "cont"}',
            b'{"execute": "query-machines"}',
        ]
        data = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(TIMEOUT)
            client.connect(str(path))
            client.sendall(CAPABILITIES + b"".join(said) + FENCE)
            while b'"fence"' not in data or not data.endswith(b"}\r\n"):
                data += client.recv(1 << 16)
        return VARIES.sub(b"#", data)

    with running_machine(front_words, host.qmp), running_machine(plain_words, plain):
        front, theirs = heard(host.qmp), heard(plain)
    sev = re.compile(rb'"(enabled|api-minor|api-major|state|handle|build-id|policy)": [^,\r]*')
    assert sev.sub(rb"\1", front) == sev.sub(rb"\1", theirs)
    assert front != theirs


# --------------------------------------------------------------------------------------------------- running machines


@EACH_QEMU
def test_events_come_where_qemu_has_them(tmp_path: Path, platform: Platform, qemu: str) -> None:
    with running_pair(tmp_path, platform, qemu) as pair:
        names = ("cont", "cont", "query-status", "stop", "stop", "cont", "query-status", "system_reset")
        said = [b'{"execute": "%s", "id": "%s"}' % (name.encode(), name.encode()) for name in names]
        front, plain = pair.conversations([CAPABILITIES, *said])
        assert front == plain
        assert sum(b'"event"' in line for line in front) >= 3
        one_write, plain = pair.conversations([CAPABILITIES + b"".join(said)])
        assert one_write == plain


@EACH_QEMU
def test_a_secret_and_a_cont_in_one_write_are_done_in_that_order(tmp_path: Path, platform: Platform, qemu: str) -> None:
    host = make_host(tmp_path, platform, 0xF)
    words = [*platform.front(qemu), *host.arguments("-display", "none")]
    with running_machine(words, host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        arguments = {key.replace("_", "-"): text for key, text in packet_for(host, blob_of(client)).items()}
        commands = [
            {"execute": INJECT, "arguments": arguments, "id": 1},
            {"execute": "cont", "id": 2},
            {"execute": "query-sev", "id": 3},
            {"execute": INJECT, "arguments": arguments, "id": 4},
        ]
        client.send(b"".join(json.dumps(command).encode() for command in commands))
        heard = [json.loads(client.line()) for _ in range(5)]
        assert heard[0] == {"return": {}, "id": 1}
        assert heard[1]["event"] == "RESUME"
        assert heard[2] == {"return": {}, "id": 2}
        assert (heard[3]["return"]["state"], heard[3]["id"]) == ("running", 3)
        assert heard[4]["error"]["desc"] == "SEV: Not in correct state. (LSECRET) 3"
        assert TEXT in read_memory(client, *SECRET_AREA, tmp_path)


@EACH_QEMU
def test_a_guest_that_was_let_run_behind_our_back_gets_no_secret(tmp_path: Path, platform: Platform, qemu: str) -> None:
    host = make_host(tmp_path, platform, 0xF)
    words = [*platform.front(qemu), *host.arguments("-display", "none")]
    with running_machine(words, host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        packet = packet_for(host, blob_of(client))
        client.ask("human-monitor-command", command_line="cont")
        assert client.refusal(INJECT, **packet) == "SEV: Not in correct state. (LSECRET) 3"
        client.ask("human-monitor-command", command_line="stop")
        assert client.refusal(INJECT, **packet) == "SEV: Not in correct state. (LSECRET) 3"
        assert client.ask("query-sev")["state"] == "running"
        assert not any(read_memory(client, *SECRET_AREA, tmp_path))


# ------------------------------------------------------------------------------------------------------------ clients


@EACH_QEMU
def test_a_second_client_waits_and_its_words_are_not_lost(pair: Pair) -> None:
    for path in (pair.host.qmp, pair.plain):
        with QmpClient(path) as first, QmpClient(path) as second:
            first.negotiate()
            second.send(CAPABILITIES + b'{"execute": "query-status", "id": "second"}')
            assert second.is_silent(0.3)
            assert first.ask("query-status")["running"] is False
            first.close()
            assert b'"QMP"' in second.line()
            assert second.reply() == {"return": {}}
            assert second.reply()["id"] == "second"


@EACH_QEMU
def test_a_client_that_leaves_in_the_middle_does_not_hurt_the_next(pair: Pair) -> None:
    for left in (
        b"",
        b"{",
        b'{"execute": "query-',
        CAPABILITIES + b'{"execute": "query-sev"}',
        b'"',
        b"\xff",
        b"[" * 50,
    ):
        for path in (pair.host.qmp, pair.plain):
            with QmpClient(path) as client:
                client.send(left)
            # QEMU may still owe the next client what the last one left unread.
            last = conversation(path, [CAPABILITIES, b'{"execute": "query-status"}'])[-4:]
            assert b'"prelaunch"' in b"".join(last)
            assert b'"return"' in last[-1]


@EACH_QEMU
def test_a_client_that_says_all_and_hangs_up_is_answered_all(pair: Pair) -> None:
    # As `socat` and `nc -N` do at the end of a script's input.
    commands = [
        b'{"execute": "%s", "id": %d}' % (name, at) for at, name in enumerate([b"query-name", b"query-sev"] * 8)
    ]
    heard = []
    for path in (pair.host.qmp, pair.plain):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(TIMEOUT)
            client.connect(str(path))
            client.sendall(CAPABILITIES + b"".join(commands) + b"\n")
            client.shutdown(socket.SHUT_WR)
            data = b""
            while piece := client.recv(1 << 16):
                data += piece
        heard.append([json.loads(line).get("id") for line in data.splitlines()])
    assert heard[0] == heard[1] == [None, None, *range(16)]


@EACH_QEMU
def test_many_clients_leave_no_descriptor_behind(tmp_path: Path, platform: Platform, qemu: str) -> None:
    there = guests(platform)
    host = make_host(tmp_path, platform)
    words = [*platform.front(qemu), *host.arguments("-display", "none")]
    with running_machine(words, host.qmp) as machine:
        with QmpClient(host.qmp) as client:
            client.negotiate()
            before = open_descriptors(machine.pid)
        for number in range(200):
            with QmpClient(host.qmp) as client:
                if number % 4:
                    client.line()
                if number % 4 == 2:
                    client.send(b'{"execute": "qmp_cap')
                if number % 4 == 3:
                    client.ask("qmp_capabilities")
                    client.ask("query-sev-capabilities")
        with QmpClient(host.qmp) as client:
            client.negotiate()
            wait_until(lambda: open_descriptors(machine.pid) <= before)
            assert guests(platform) == there + 1
    wait_for_guests(platform, there)


@EACH_QEMU
def test_a_client_that_never_reads_cannot_keep_the_machine_from_its_end(
    tmp_path: Path, platform: Platform, qemu: str
) -> None:
    there = guests(platform)
    host = make_host(tmp_path, platform)
    words = [*platform.front(qemu), *host.arguments("-display", "none")]
    with running_machine(words, host.qmp) as machine, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(host.qmp))
        client.settimeout(0.3)
        client.sendall(CAPABILITIES)
        with contextlib.suppress(TimeoutError):
            while True:
                client.sendall(b'{"execute": "query-machines"}' * 100)
        machine.terminate()
        # A real QEMU 10.0.2 was once seen to crash here by itself, with megabytes of answers that nobody takes.
        assert machine.wait(30) in {0, -signal.SIGSEGV}
    wait_for_guests(platform, there)


@EACH_QEMU
def test_a_nonce_is_reported_on_and_another_length_refused(pair: Pair) -> None:
    with QmpClient(pair.host.qmp) as client:
        client.negotiate()
        assert client.ask("query-sev-attestation-report", mnonce=b64(bytes(16)))["data"]
        wrong = client.refusal("query-sev-attestation-report", mnonce=b64(bytes(15)))
        assert wrong == "SEV: mnonce must be 16 bytes (got 15)"
