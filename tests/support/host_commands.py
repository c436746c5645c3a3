"""The commands of a host, called in this process, and their files."""

from __future__ import annotations

from pathlib import Path

from orchestrator.cli import main
from tests.support.platform import Platform

OLD = b"what stood here before"


def do(*words: object) -> int:
    """Run `sevattest` with these words; its exit code."""
    return main([str(word) for word in words])


def export(host: Platform, target: Path, *words: object) -> int:
    """`sevattest export` with the software platform's root and signed CEK."""
    return do("export", "--kds", host.kds, "--ca", host.ask_ark, target, *words)


def write(path: Path, data: bytes) -> Path:
    """Make a file, and return it."""
    path.write_bytes(data)
    return path


def names(folder: Path) -> set[str]:
    """What a folder holds."""
    return {path.name for path in folder.iterdir()}
