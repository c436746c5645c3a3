"""What a QEMU command line says, as far as a launch depends on it: `-kernel`, `-smp`, `-m`, flash drives, monitors.

Lenient: a word that is not understood is skipped. What may stand on a command line at all is
`host_agent/hypervisors/arguments.py`'s to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_UNITS = {"": 1 << 20, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}  # QEMU's -m means MiB
_SIZE = re.compile(r"(\d{1,9})([BKMGT]?)", re.IGNORECASE | re.ASCII)
_DEFAULT_MEMORY = 128 << 20
_MONITOR_OPTIONS = ("qmp", "qmp-pretty", "monitor")


class Options:
    """QEMU's arguments, read."""

    def __init__(self, args: Sequence[str]) -> None:
        self._args = tuple(args)

    def values(self, *names: str) -> Iterator[str]:
        """The values of these options, in their order."""
        for word, value in zip(self._args, self._args[1:], strict=False):
            if word.startswith("-") and word.lstrip("-") in names:
                yield value

    def value(self, name: str) -> str | None:
        """The last value of an option, which is the one that QEMU takes."""
        return next(reversed([*self.values(name)]), None)

    @property
    def vcpus(self) -> int | None:
        """How many vCPUs the guest starts with; None where that is not understood."""
        text = self.value("smp")
        if text is None:
            return 1
        pairs = _pairs(text)
        # QEMU (hw/core/machine-smp.c): without `cpus` there are as many as may come, without `maxcpus` the topology's.
        if count := pairs.get("cpus") or pairs.get("") or pairs.get("maxcpus"):
            return _number(count)
        product = 1
        for key in ("sockets", "dies", "clusters", "cores", "threads"):
            product *= _number(pairs.get(key, "1")) or 0
        return product or None

    @property
    def memory(self) -> int | None:
        """The guest's RAM in bytes; None where that is not understood."""
        text = self.value("m")
        if text is None:
            return _DEFAULT_MEMORY
        pairs = _pairs(text)
        found = _SIZE.fullmatch(pairs.get("size") or pairs.get("") or "")
        return None if found is None else int(found[1]) * _UNITS[found[2].upper()]

    @property
    def cpu(self) -> str | None:
        """The processor model, without its flags."""
        text = self.value("cpu")
        return None if text is None else text.partition(",")[0]

    @property
    def nvram(self) -> str | None:
        """The first flash drive that is not the measured one, as it stands there."""
        for name in ("drive", "machine", "M", "pflash"):
            for value in self.values(name):
                pairs = _pairs(value)
                second = pairs.get("if") == "pflash" and (pairs.get("unit", "0") != "0" or "readonly" not in pairs)
                if name == "pflash" or second or "pflash1" in pairs:
                    return f"-{name} {value}"
        return None

    @property
    def monitors(self) -> list[str]:
        """Paths of the Unix sockets on which the guest's monitors are."""
        paths = [
            value.partition(",")[0].removeprefix("unix:")
            for value in self.values(*_MONITOR_OPTIONS)
            if value.startswith("unix:")
        ]
        wired = {_pairs(value).get("chardev") or _pairs(value).get("") for value in self.values("mon")}
        for value in self.values("chardev"):
            pairs = _pairs(value)
            if pairs.get("") == "socket" and pairs.get("id") in wired and "path" in pairs:
                paths.append(pairs["path"])
        return paths


def _pairs(value: str) -> dict[str, str]:
    """QEMU's `first,key=value,…`; the first may lack its key."""
    pairs: dict[str, str] = {}
    for part in value.replace(",,", "\0").split(","):
        key, found, text = part.partition("=")
        pairs[key.strip() if found else ""] = (text if found else key).replace("\0", ",")
    return pairs


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None
