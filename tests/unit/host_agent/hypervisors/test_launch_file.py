"""The file for `-readconfig`: what a real QEMU makes of it, and that it says what a command line would."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import InvalidInput
from emulator.firmware_image import build_image
from host_agent.hypervisors.arguments import MachineOptions, command_line, launch_file
from host_agent.hypervisors.expected import Expected
from tests.support.machine_kinds import expanded, merged
from tests.support.real_qemu import EACH_QEMU, qemu, version_of

__all__ = ["qemu"]  # a fixture
OPTIONS = MachineOptions(firmware=Path("/srv/OVMF.fd"), cbitpos=51, reduced_phys_bits=1, policy=0xF)


def words(option: str, line: list[str]) -> list[str]:
    return [line[index + 1] for index, word in enumerate(line) if word == option]


def test_it_says_what_the_command_line_of_a_spawned_machine_says(tmp_path: Path) -> None:
    file = tmp_path / "launch.cfg"
    file.write_text(launch_file(OPTIONS, Path("/run/x")))
    written = merged(["-machine", "q35", *expanded(["-readconfig", str(file)])])
    spawned = command_line(["qemu"], ["-machine", "q35", "-kernel", "/k"], OPTIONS)
    [sev] = words("-object", spawned)
    sev = sev.replace("dh-cert-file=", "dh-cert-file=/run/x/").replace("session-file=", "session-file=/run/x/")
    [(kind, *read)] = [sev_word.split(",") for sev_word in words("-object", written)]
    assert (kind, sorted(read)) == (sev.split(",")[0], sorted(sev.split(",")[1:]))
    assert words("-drive", written) == words("-drive", spawned)
    assert words("-machine", written) == words("-machine", spawned)


@EACH_QEMU
def test_a_real_qemu_takes_the_firmware_and_merges_the_machine(qemu: str, tmp_path: Path) -> None:
    firmware = tmp_path / "OVMF.fd"
    firmware.write_bytes(build_image("one"))
    head = Expected.from_now(tmp_path / "launch.cfg", uuid4()).head
    text = head + launch_file(replace(OPTIONS, firmware=firmware), tmp_path)
    # Without SEV an object of another kind takes the place of the guest's: what counts is how it is linked.
    text = text.replace('"sev-guest"', '"memory-backend-ram"').replace("confidential-guest-support", "memory-backend")
    kept = [
        line
        for line in text.splitlines()
        if not line.startswith(("  cbit", "  red", "  pol", "  dh", "  ses", "  ker"))
    ]
    kept.insert(2, '  size = "134217728"')
    (tmp_path / "launch.cfg").write_text("\n".join(kept) + "\n")
    told = _ask(qemu, tmp_path, "query-block", "query-memdev")
    [flash] = [block for block in told["query-block"] if block["device"] == "pflash0"]
    assert flash["inserted"]["file"] == str(firmware)
    assert flash["inserted"]["ro"]
    assert [memory["id"] for memory in told["query-memdev"]] == ["sevattest0"]


@EACH_QEMU
def test_a_real_qemu_takes_the_object_and_its_link(qemu: str, tmp_path: Path) -> None:
    firmware = tmp_path / "OVMF.fd"
    firmware.write_bytes(build_image("one"))
    file = tmp_path / "launch.cfg"
    file.write_text(launch_file(replace(OPTIONS, firmware=firmware), tmp_path))
    done = _run(qemu, "-readconfig", str(file))
    # Here there is no SEV; each version says so in its way, and it says so only of a guest that is to have it.
    assert done.returncode != 0
    old, new = "`machine->cgs->ready' failed", "accelerator does not support confidential guest sev-guest"
    assert (new if version_of(qemu) >= (9, 0) else old) in done.stderr
    file.write_text(file.read_text().replace("kernel-hashes", "kernel-hashs"))
    assert "kernel-hashs" in _run(qemu, "-readconfig", str(file)).stderr


@pytest.mark.parametrize("path", ['/srv/"x"', "/srv/a\nb", "/" + "x" * 1000])
def test_a_path_that_the_file_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(InvalidInput, match="cannot stand in a configuration file"):
        launch_file(replace(OPTIONS, firmware=Path(path)), Path("/run/x"))
    with pytest.raises(InvalidInput, match="cannot stand in a configuration file"):
        launch_file(OPTIONS, Path(path))


def _run(qemu: str, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    line = [qemu, "-nodefaults", "-machine", "q35", "-accel", "tcg", "-display", "none", "-S", *arguments]
    return subprocess.run(line, input=said, capture_output=True, text=True, check=False, timeout=60)


def _ask(qemu: str, folder: Path, *commands: str) -> dict[str, list[dict[str, Any]]]:
    asked = ["qmp_capabilities", *commands, "quit"]
    said = "".join(json.dumps({"execute": name, "id": name}) + "\n" for name in asked)
    done = _run(qemu, "-readconfig", str(folder / "launch.cfg"), "-qmp", "stdio", said=said)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer["id"]: answer["return"] for answer in answers if "return" in answer}
