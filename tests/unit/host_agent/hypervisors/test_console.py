"""A machine's log: private, bounded, and read for its last words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import PlatformFailed
from host_agent.hypervisors.console import LOG, last_words, open_log, trim_log

FIRMWARE = "sev_launch_start: LAUNCH_START ret=1 fw_error=11 'Bad measurement'"
NO_ES = "-accel kvm: sev_common_kvm_init: guest policy requires SEV-ES, but host SEV-ES support unavailable"
QEMU_10 = "qemu-system-x86_64"
QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("\n\n", ""),
        ("qemu-system-x86_64: -accel kvm: failed\n", "-accel kvm: failed"),
        ("qemu-system-x86_64: first\nqemu-system-x86_64: last\n\n", "last"),
        (
            f"qemu-system-x86_64: {FIRMWARE}\nqemu-system-x86_64: -accel kvm: failed to initialize kvm\n",
            FIRMWARE,
        ),
        ("qemu: failed to initialize ret=-25 fw_error=0\nqemu: -accel kvm: no\n", "-accel kvm: no"),
        # QEMU 10.0 on a platform without SEV-ES, and a line that only looks like its own.
        (f"{QEMU_10}: {NO_ES}\nsev_x: y\n{QEMU_10}: failed to initialize kvm: Operation not permitted\n", NO_ES),
        (f"sev_x: y\n{QEMU_10}: -m: no\n", "-m: no"),
        ("\x1b[31mred\x00\x07\n", "[31mred"),
        ("sev-host-agent: 1: exec: /x: not found", "sev-host-agent: 1: exec: /x: not found"),
    ],
)
def test_the_most_telling_sentence_is_found(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / LOG).write_text(text)
    assert last_words(tmp_path, QEMU) == words


def test_bytes_that_are_no_text_make_no_trouble(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(os.urandom(1 << 16))
    assert len(last_words(tmp_path, QEMU)) <= 300
    assert last_words(tmp_path / "nowhere", QEMU) == ""


def test_the_log_is_private_and_starts_empty(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("of another run")
    (tmp_path / LOG).chmod(0o600)
    with open_log(tmp_path):
        pass
    assert (tmp_path / LOG).stat().st_size == 0
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600


def test_a_link_in_the_logs_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOG).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlatformFailed, match="symbolic links"):
        open_log(tmp_path)


def test_a_long_log_keeps_its_end_and_its_writer_goes_on_behind_it(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write(b"a" * (1 << 20))
        log.write(b"the end")
        trim_log(tmp_path)
        kept = (tmp_path / LOG).read_bytes()
        assert len(kept) == 64 * 1024
        assert kept.endswith(b"the end")
        log.write(b", and on")
    assert (tmp_path / LOG).read_bytes() == kept + b", and on"


def test_a_short_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"a" * 1000)
    trim_log(tmp_path)
    assert (tmp_path / LOG).stat().st_size == 1000
    trim_log(tmp_path / "nowhere")
