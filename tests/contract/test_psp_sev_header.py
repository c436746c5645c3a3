"""Every number, size and offset of the ioctl driver is the kernel header's own, as a C compiler sees it.

Needs a C compiler and the kernel's user-space headers (Debian: gcc, linux-libc-dev); says so where they are missing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from common.sev.abi import DeviceCommand, Status
from host_agent.devices import ioctl

# Ours -> the header's.
STRUCTURES = {
    ioctl.IssueCommand: "sev_issue_cmd",
    ioctl.PlatformStatusData: "sev_user_data_status",
    ioctl.PekCsrData: "sev_user_data_pek_csr",
    ioctl.PekCertImportData: "sev_user_data_pek_cert_import",
    ioctl.PdhCertExportData: "sev_user_data_pdh_cert_export",
    ioctl.GetIdData: "sev_user_data_get_id",
    ioctl.GetId2Data: "sev_user_data_get_id2",
}
# The header's own spelling.
HEADER_STATUS = {
    Status.INVALID_CONFIG: "INAVLID_CONFIG",
    Status.HWSEV_PLATFORM: "HWSEV_RET_PLATFORM",
    Status.HWSEV_UNSAFE: "HWSEV_RET_UNSAFE",
}


def _ours() -> dict[str, int]:
    """C expression -> what we say that it is."""
    told = {"SEV_ISSUE_CMD": ioctl.SEV_ISSUE_CMD, "SEV_MAX": len(DeviceCommand)}
    told |= {f"SEV_{command.name}": command for command in DeviceCommand}
    told |= {f"SEV_RET_{HEADER_STATUS.get(status, status.name)}": status for status in Status}
    for structure, name in STRUCTURES.items():
        told[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            told[f"offsetof(struct {name}, {field})"] = getattr(structure, field).offset
            told[f"sizeof(((struct {name} *)0)->{field})"] = getattr(structure, field).size
    return told


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """C expression -> what the header says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/psp-sev.h").exists():
        pytest.skip("no C compiler or no linux/psp-sev.h, install the Debian packages gcc and linux-libc-dev")
    folder = tmp_path_factory.mktemp("header")
    source, program = folder / "numbers.c", folder / "numbers"
    lines = "\n".join(f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in _ours())
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/psp-sev.h>\n"
        f"int main(void) {{\n{lines}\nreturn 0;\n}}\n"
    )
    subprocess.run([compiler, "-Wall", "-Werror", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(_ours(), map(int, printed.split()), strict=True))


@pytest.mark.parametrize("expression", _ours())
def test_a_number_is_the_headers_own(header: dict[str, int], expression: str) -> None:
    assert _ours()[expression] == header[expression]


def test_no_field_of_the_header_is_left_out(header: dict[str, int]) -> None:
    for structure, name in STRUCTURES.items():
        fields = sum(header[f"sizeof(((struct {name} *)0)->{field})"] for field, *_ in structure._fields_)
        assert fields == header[f"sizeof(struct {name})"]


def test_each_command_has_the_structure_that_the_header_names() -> None:
    assert set(ioctl.DATA_OF) == set(DeviceCommand)
    named = {command: data and STRUCTURES[data] for command, data in ioctl.DATA_OF.items()}
    for command, structure in named.items():
        stem = {DeviceCommand.PLATFORM_STATUS: "status"}.get(command, command.name.lower())
        assert structure in {None, f"sev_user_data_{stem}"}
    without = {command for command, structure in named.items() if structure is None}
    assert without == {DeviceCommand.FACTORY_RESET, DeviceCommand.PEK_GEN, DeviceCommand.PDH_GEN}
