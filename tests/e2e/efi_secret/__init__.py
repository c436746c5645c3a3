"""Builds Linux's driver efi_secret for a kernel that was made without it, from that kernel's own source."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from common.errors import Reason, Unavailable

DRIVER = "drivers/virt/coco/efi_secret/efi_secret.c"
# In the order of loading: the driver finds its device when it comes.
_MODULES = ("efi_secret_device", "efi_secret")


def build_modules(*, headers: Path, source: Path, release: str, work: Path, into: Path) -> None:
    """Build the modules.

    Args:
        headers: an unpacked root with the kernel's header packages.
        source: the kernel's source as a tar archive, of which one file is used.
        release: of the kernel, as `uname -r` says it.
        work: an empty folder.
        into: the folder in which the modules are put, named in the order of loading; it must be there.

    Raises:
        Unavailable: a tool is missing, or the modules cannot be built.
    """
    for tool in ("gcc", "make", "tar"):
        if shutil.which(tool) is None:
            raise Unavailable(Reason.UNREACHABLE, f"{tool} is needed to build efi_secret; install the package {tool}")
    top = f"{source.name.removesuffix('.tar.xz')}/{DRIVER}"
    _run(["tar", "-xf", str(source), "-C", str(work), "--strip-components=5", top])
    shutil.copy(Path(__file__).parent / f"{_MODULES[0]}.c", work)
    (work / "Kbuild").write_text("".join(f"obj-m += {module}.o\n" for module in _MODULES))
    tree = _relocated(headers, release)
    _run(["make", "-C", str(tree), f"M={work}", "CC=gcc", "modules"])
    for number, module in enumerate(_MODULES):
        shutil.copy(work / f"{module}.ko", into / f"{number:02d}-{module}.ko")


def _relocated(headers: Path, release: str) -> Path:
    """The kernel's build folder; its makefile names the folder in which the package expects to be installed."""
    tree = headers / f"usr/src/linux-headers-{release}"
    makefile = tree / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{headers}/usr/src/"))
    return tree


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Unavailable(Reason.UNREACHABLE, f"efi_secret cannot be built: {command[0]} says {' '.join(last)}")
