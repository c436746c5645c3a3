"""Picks kernel modules out of a package, with those that they need, in the order in which they are to be loaded."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path

from common.errors import Reason, Unavailable

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")  # in the section .modinfo
_SUFFIXES = (".ko", ".ko.xz")


def copy_modules(tree: Path, names: Iterable[str], into: Path) -> None:
    """Copy modules, decompressed, as `NN-name.ko`.

    Args:
        tree: `/lib/modules/RELEASE` of an unpacked kernel package.
        names: the modules that are wanted, without suffix; those that the kernel has built in are left out.
        into: a folder, which is made.

    Raises:
        Unavailable: the kernel has no such module.
    """
    files = {_plain(path.name.split(".")[0]): path for path in tree.rglob("*.ko*") if path.name.endswith(_SUFFIXES)}
    listing = tree / "modules.builtin"
    built_in = {_plain(Path(line).stem) for line in listing.read_text().splitlines()} if listing.is_file() else set()
    chosen: dict[str, bytes] = {}

    def choose(name: str) -> None:
        if name in chosen or name in built_in:
            return
        if name not in files:
            raise Unavailable(Reason.UNREACHABLE, f"the kernel has no module {name}")
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        found = _DEPENDS.search(content)
        for needed in found[1].decode().split(",") if found and found[1] else ():
            choose(_plain(needed))
        chosen[name] = content

    for name in names:
        choose(_plain(name))
    into.mkdir()
    for number, (name, content) in enumerate(chosen.items()):
        (into / f"{number:02d}-{name}.ko").write_bytes(content)


def _plain(name: str) -> str:
    """Modules are named with either dash."""
    return name.replace("-", "_")
