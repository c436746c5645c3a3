"""The device socket as a stranger's client sees it: frames written here by hand, from docs/software-platform.md."""

from __future__ import annotations

import errno
import shutil
import signal
import socket
import stat
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.sev.certs.sev import SevCertificate, verify_signature
from emulator.device_server import MAX_CONNECTIONS
from emulator.errors import StateFolderUnusable
from emulator.faults import Fault, Faults
from emulator.keys import GENERATIONS, make_chip
from tests.support.eventually import wait_until
from tests.support.platform import Platform, platform_in_thread, running_platform

NO_CALL = 0xFFFFFFFF
OPEN = 0xFFFF0000


class Client:
    """One connection, without any of the project's code."""

    def __init__(self, path: Path, flags: int | None = 1) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        if flags is not None:
            assert self.ask(OPEN, struct.pack("<I", flags)) == (0, NO_CALL, b"")

    def ask(self, command: int, payload: bytes = b"") -> tuple[int, int, bytes]:
        self.socket.sendall(struct.pack("<II", command, len(payload)) + payload)
        return self.reply()

    def reply(self) -> tuple[int, int, bytes]:
        number, status, length = struct.unpack("<iII", self._read(12))
        return number, status, self._read(length)

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            assert piece, "the server closed the connection"
            data += piece
        return data

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def platform(tmp_path: Path, faults: Faults) -> Iterator[Platform]:
    with platform_in_thread(tmp_path / "p", "naples", faults=faults) as served:
        yield served


def ask_once(platform: Platform, command: int, payload: bytes) -> tuple[int, int, bytes]:
    """One question on a read-only connection of its own."""
    client = Client(platform.socket, 0)
    try:
        return client.ask(command, payload)
    finally:
        client.close()


def fetch(url: str) -> tuple[int, bytes]:
    """Status and body of a GET."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 -- our own URL on the loopback
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


def state_of(platform: Platform) -> tuple[int, int]:
    """Platform state and guest count."""
    client = Client(platform.socket, 0)
    number, status, data = client.ask(1)
    client.close()
    assert (number, status, len(data)) == (0, 0, 12)
    return data[2], int.from_bytes(data[8:], "little")


def test_a_platform_is_up_and_exports_to_a_reader(platform: Platform) -> None:
    client = Client(platform.socket, 0)
    assert state_of(platform) == (1, 0)
    number, status, data = client.ask(5, struct.pack("<II", 2084, 6252))
    assert (number, status, data[:8]) == (0, 0, struct.pack("<II", 2084, 6252))
    assert SevCertificate.parse(data[8:2092]).usage == 0x1003
    assert client.ask(2) == (errno.EPERM, NO_CALL, b"")
    assert client.ask(5, bytes(8)) == (errno.EIO, 4, struct.pack("<II", 2084, 6252))
    client.close()


@pytest.mark.parametrize(
    ("command", "payload", "code"),
    [
        (1, b"", errno.EBADF),
        (OPEN, b"", errno.EINVAL),
        (OPEN, bytes(8), errno.EINVAL),
        (OPEN, struct.pack("<I", 2), errno.EINVAL),
    ],
)
def test_a_connection_that_does_not_open_is_told_so_and_closed(
    platform: Platform, command: int, payload: bytes, code: int
) -> None:
    client = Client(platform.socket, None)
    assert client.ask(command, payload) == (code, NO_CALL, b"")
    assert client.is_closed()
    client.close()


def test_a_second_open_is_einval_and_harmless(platform: Platform) -> None:
    client = Client(platform.socket, 0)
    assert client.ask(OPEN, struct.pack("<I", 1)) == (errno.EINVAL, NO_CALL, b"")
    assert client.ask(2) == (errno.EPERM, NO_CALL, b"")
    client.close()


def test_a_request_that_announces_too_much_ends_its_connection_alone(platform: Platform) -> None:
    hostile, bystander = Client(platform.socket), Client(platform.socket)
    hostile.socket.sendall(struct.pack("<II", 1, 65537))
    assert hostile.reply() == (errno.EMSGSIZE, NO_CALL, b"")
    assert hostile.is_closed()
    assert bystander.ask(1)[0] == 0
    largest = struct.pack("<Q", 0) + bytes(65536 - 8)
    assert bystander.ask(0x101, largest) == (errno.ENOTTY, NO_CALL, b"")
    hostile.close()
    bystander.close()


def test_half_frames_and_sudden_ends_leave_the_platform_alive(platform: Platform) -> None:
    waiting = []
    for part in (b"", b"\1", struct.pack("<I", OPEN), struct.pack("<II", OPEN, 4), struct.pack("<II", OPEN, 4) + b"\1"):
        for leave in (True, False):
            client = Client(platform.socket, None)
            client.socket.sendall(part)
            if leave:
                client.close()
            else:
                waiting.append(client)
    for noise in (b"\xff" * 64, bytes(1000), b"GET / HTTP/1.1\r\n\r\n" * 10):
        client = Client(platform.socket, None)
        client.socket.sendall(noise)
        client.close()
    reader = Client(platform.socket)
    reader.socket.sendall(struct.pack("<II", 1, 0) * 50)  # does not wait for its replies
    reader.close()
    assert state_of(platform) == (1, 0)
    for client in waiting:
        client.close()


def test_a_guest_ends_with_its_connection(platform: Platform) -> None:
    machine = Client(platform.socket)
    assert machine.ask(0x100, struct.pack("<IIII", 0, 1, 0, 0))[0] == 0
    assert state_of(platform) == (2, 1)
    other = Client(platform.socket)
    assert other.ask(0) == (errno.EBUSY, NO_CALL, b"")
    machine.close()
    wait_until(lambda: state_of(platform) == (1, 0))
    assert other.ask(0) == (0, 0, b"")
    other.close()


def test_requests_of_many_connections_do_not_mix(platform: Platform) -> None:
    wrong: list[object] = []

    def run(number: int) -> None:
        client = Client(platform.socket)
        for turn in range(40):
            length = (number * 7 + turn) % 200
            code, status, data = client.ask(8, struct.pack("<I", length))
            wanted = (0, 0, 68 if length < 128 else 132) if length >= 64 else (errno.EIO, 4, 4)
            if (code, status, len(data)) != wanted:
                wrong.append((length, code, status, len(data)))
        client.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_injected_fault_meets_one_request(platform: Platform, faults: Faults) -> None:
    client = Client(platform.socket)
    faults.inject(5, Fault(errno=errno.EIO, status=0x13))
    faults.inject(5, Fault(errno=errno.EBUSY))
    lengths = struct.pack("<II", 2084, 6252)
    assert client.ask(5, lengths) == (errno.EIO, 0x13, b"")
    assert client.ask(1)[0] == 0
    assert client.ask(5, lengths) == (errno.EBUSY, NO_CALL, b"")
    assert client.ask(5, lengths)[0] == 0
    client.close()


def test_a_platform_without_init_keeps_readers_out_of_its_keys(tmp_path: Path) -> None:
    with platform_in_thread(tmp_path / "p", "naples", initialise=False) as platform:
        assert state_of(platform) == (0, 0)
        reader, writer = Client(platform.socket, 0), Client(platform.socket)
        lengths = struct.pack("<II", 2084, 6252)
        assert reader.ask(5, lengths) == (errno.EPERM, NO_CALL, b"")
        assert writer.ask(5, lengths)[0] == 0
        assert reader.ask(5, lengths)[0] == 0
        reader.close()
        writer.close()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.bind(str(folder / "sev.sock"))
        stranger.listen(1)
        with pytest.raises(StateFolderUnusable, match="served on"), platform_in_thread(folder, "naples"):
            pass
    with platform_in_thread(folder, "naples") as platform:
        assert state_of(platform) == (1, 0)
        with pytest.raises(StateFolderUnusable, match="another process"), platform_in_thread(folder, "naples"):
            pass
        assert state_of(platform) == (1, 0)
    assert not (folder / "sev.sock").exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "sev.sock").write_text("mine")
    with pytest.raises(StateFolderUnusable, match="not a socket"), platform_in_thread(folder, "naples"):
        pass
    assert (folder / "sev.sock").read_text() == "mine"


def test_a_folder_stays_what_it_was_made_as(tmp_path: Path) -> None:
    with platform_in_thread(tmp_path / "p", "naples") as platform:
        before = ask_once(platform, 5, struct.pack("<II", 2084, 6252))
    with platform_in_thread(tmp_path / "p", "naples") as platform:
        assert ask_once(platform, 5, struct.pack("<II", 2084, 6252)) == before
    with pytest.raises(StateFolderUnusable, match="is naples, not milan"), platform_in_thread(tmp_path / "p", "milan"):
        pass


def test_the_socket_is_open_to_its_owner_alone(platform: Platform) -> None:
    assert stat.S_IMODE(platform.socket.stat().st_mode) == 0o600


def test_another_chip_brings_another_root_and_other_keys(tmp_path: Path) -> None:
    with platform_in_thread(tmp_path / "p", "naples") as platform:
        before = ask_once(platform, 5, struct.pack("<II", 2084, 6252))[2]
        root = platform.ask_ark.read_bytes()
    shutil.rmtree(tmp_path / "p" / "chip")
    make_chip(tmp_path / "other", GENERATIONS["naples"]).folder.rename(tmp_path / "p" / "chip")
    with platform_in_thread(tmp_path / "p", "naples") as platform:
        pdh, pek, _, cek = (
            SevCertificate.parse(ask_once(platform, 5, struct.pack("<II", 2084, 6252))[2][at : at + 2084])
            for at in (8, 2092, 4176, 6260)
        )
        verify_signature(pek, cek)
        verify_signature(pdh, pek)
        assert pdh.raw not in before
        assert platform.ask_ark.read_bytes() != root


def test_the_key_service_gives_the_signed_cek_in_either_case(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples", key_service=True) as platform:
        chip = ask_once(platform, 8, struct.pack("<I", 64))[2][4:].hex()

        def get(path: str) -> tuple[int, bytes]:
            return fetch(f"{platform.key_service}{path}")

        status, upper = get(f"/cek/id/{chip.upper()}")
        assert (status, len(upper)) == (200, 2084)
        assert get(f"/cek/id/{chip}") == (200, upper)
        assert (platform.kds / f"{chip.upper()}.cert").read_bytes() == upper
        assert get(f"/cek/id/{'0' * 128}") == (404, b"")
        for path in (
            f"/cek/id/{chip}0",
            f"/cek/id/{chip[:-1]}",
            "/",
            "/cek/id/../../chip/cek.pem",
            f"/cek/id/{chip}?x",
        ):
            assert get(path) == (400, b"")
        with socket.create_connection(("127.0.0.1", int(str(platform.key_service).rsplit(":", 1)[1]))) as noise:
            noise.sendall(b"\0" * 20000)
        assert get(f"/cek/id/{chip}") == (200, upper)


def test_a_resigning_key_service_signs_anew_each_time(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples", key_service=True, options=["--kds-resign"]) as platform:
        chip = ask_once(platform, 8, struct.pack("<I", 64))[2][4:].hex()
        url = f"{platform.key_service}/cek/id/{chip}"
        answers = [SevCertificate.parse(fetch(url)[1]) for _ in range(2)]
        assert answers[0] != answers[1]
        assert answers[0].body == answers[1].body


def test_a_burst_of_connections_is_served_up_to_the_limit_and_leaves_nothing_open(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples") as platform:
        assert platform.process is not None
        folder = Path(f"/proc/{platform.process.pid}/fd")
        before = len(list(folder.iterdir()))
        platform.process.send_signal(signal.SIGSTOP)  # as if it were busy with somebody's command
        try:
            burst = [Client(platform.socket, None) for _ in range(MAX_CONNECTIONS)]
        finally:
            platform.process.send_signal(signal.SIGCONT)
        assert all(client.ask(OPEN, struct.pack("<I", 1))[0] == 0 for client in burst)
        late = Client(platform.socket, None)
        assert late.is_closed()
        for client in (*burst, late):
            client.close()
        wait_until(lambda: len(list(folder.iterdir())) <= before)
        assert state_of(platform) == (1, 0)


def test_killing_the_server_while_it_writes_leaves_old_keys_or_new_ones_and_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    for turn in range(6):
        with running_platform(folder, "naples") as platform:
            assert {path.name for path in folder.iterdir()} == {
                *("chip", "kds", "lock", "sev.sock", "identity.json", "ask_ark.cert")
            }
            (cek_file,) = platform.kds.iterdir()
            chain = ask_once(platform, 5, struct.pack("<II", 2084, 6252))[2]
            pdh, pek, _, cek = (SevCertificate.parse(chain[at : at + 2084]) for at in (8, 2092, 4176, 6260))
            verify_signature(pdh, pek)
            verify_signature(pek, cek)
            client = Client(platform.socket)
            for _ in range(2 + turn):
                client.socket.sendall(struct.pack("<II", 2, 0) * 3)
            assert client.reply()[0] == 0
            assert platform.process is not None
            platform.process.kill()
            platform.process.wait()
            client.close()
        # What a killed process leaves: unfinished files beside the good ones, with private keys in them.
        for name in (".identity.json.abc", ".ask_ark.cert.abc", f"kds/.{cek_file.name}.abc"):
            (folder / name).write_bytes(b"half")
        (folder / ".chip.abc").mkdir()
        (folder / ".chip.abc" / "ark.pem").write_bytes(b"half")


def test_killing_the_server_leaves_a_folder_that_serves_again(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples") as platform:
        before = ask_once(platform, 5, struct.pack("<II", 2084, 6252))
        assert platform.process is not None
        platform.process.kill()
        platform.process.wait()
        assert platform.socket.exists()
    with running_platform(tmp_path / "p", "naples") as platform:
        assert ask_once(platform, 5, struct.pack("<II", 2084, 6252)) == before
    assert not platform.socket.exists()
