"""What must be there before the run: QEMU from the system, the guest's parts in a folder: `python -m … DIR`.

Names every Debian package that is missing and what then cannot be shown. Installs one only as root in CI (CI=true);
everything else is unpacked into the folder. Exit code 0 in any case: what cannot be shown is skipped by the run, which
says so again in its summary.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import SevattestError
from orchestrator.demo.guest.parts import QEMU
from tests.e2e import packages
from tests.e2e.inventory import STOCK
from tests.e2e.private_apt import PrivateApt

# What a real machine needs from the system, each with the program that shows that it is there.
PACKAGES = {"qemu-system-x86": QEMU}
_STOCK_IMAGES = ("OVMF_CODE.fd", "OVMF_CODE_4M.fd", "OVMF.fd")


def lacking(search_path: str) -> list[str]:
    """The Debian packages whose programs are not there."""
    return [package for package, program in PACKAGES.items() if shutil.which(program, path=search_path) is None]


def may_install(environ: Mapping[str, str], uid: int) -> bool:
    """Whether packages may be installed without asking: by root, in CI."""
    return uid == 0 and environ.get("CI") == "true" and shutil.which("apt-get") is not None


def install(names: Sequence[str]) -> str | None:
    """Install packages; returns why not, or None."""
    steps = (["apt-get", "-qq", "update"], ["apt-get", "-qq", "-y", "--no-install-recommends", "install", *names])
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            return (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
    return None


def get_stock_firmware(folder: Path) -> None:
    """Put the distribution's own OVMF, which is no AmdSev build, into the folder, for a host that tries it.

    Raises:
        SevattestError: the package cannot be had.
    """
    target = folder / STOCK
    if target.is_file():
        return
    # Beside its place, so that it can be renamed into it: another run may do the same at this moment.
    with tempfile.TemporaryDirectory(prefix=f".{STOCK}-", dir=folder) as room:
        apt = PrivateApt(Path(room))
        apt.update()
        (root := Path(room) / "root").mkdir()
        apt.unpack(["ovmf"], root)
        found = {path.name: path for path in root.rglob("OVMF*.fd")}
        image = next(found[name] for name in _STOCK_IMAGES if name in found)
        shutil.copyfile(image, Path(room) / STOCK)
        (Path(room) / STOCK).replace(target)


def main() -> int:
    """Get what can be had and say what cannot."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.prerequisites")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--qemu", type=Path, help="a QEMU to use instead of the system's")
    parser.add_argument("--efi-secret", action="store_true", help="builds the driver efi_secret too")
    arguments = parser.parse_args()
    _system(arguments.qemu)
    folder: Path = arguments.folder.absolute()
    try:
        for part, sentence in packages.make(folder, efi_secret=arguments.efi_secret).items():
            _say(f"no {part}: {sentence}")
        get_stock_firmware(folder)
    except (SevattestError, OSError) as error:
        _say(str(error))
    return 0


def _system(qemu: Path | None) -> None:
    missing = [] if qemu is not None else lacking(os.environ.get("PATH", os.defpath))
    if not missing:
        return
    if not may_install(os.environ, os.geteuid()):
        _say(f"missing: {' '.join(missing)}; install with: apt-get install --no-install-recommends {' '.join(missing)}")
        return
    _say(f"installing {' '.join(missing)}")
    if (problem := install(missing)) is not None:
        _say(f"missing: {' '.join(missing)}; could not be installed: {problem}")


def _say(text: str) -> None:
    sys.stderr.write(f"e2e: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
