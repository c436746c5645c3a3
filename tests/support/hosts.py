"""Hosts to look at: those of tests/vectors/hosts, and copies of them with something changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.findings import Finding

HOSTS = Path(__file__).parents[1] / "vectors" / "hosts"


def host(name: str) -> CapturedMachine:
    """A host as it was written down."""
    return CapturedMachine(HOSTS / name)


def changed(
    folder: Path, name: str, files: Mapping[str, str | None], *, facts: Mapping[str, str | None] | None = None
) -> Path:
    """A copy of a host's folder.

    Args:
        folder: where the copy is made.
        name: whose.
        files: by path; None removes one.
        facts: replaces lines of `machine.toml` that start with a key; None removes one.
    """
    root = folder / "host"
    shutil.copytree(HOSTS / name, root)
    for path, text in files.items():
        if text is None:
            (root / path).unlink()
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    toml = root / "machine.toml"
    for key, line in (facts or {}).items():
        lines = toml.read_text().splitlines(keepends=True)
        assert any(known.startswith(key) for known in lines), key
        kept = [(known if line is None or not known.startswith(key) else f"{line}\n") for known in lines]
        kept = [known for known in kept if line is not None or not known.startswith(key)]
        toml.write_text("".join(kept))
    return root


def outcomes(findings: list[Finding]) -> dict[str, str]:
    """Verdict by probe."""
    assert len({finding.probe for finding in findings}) == len(findings), "each probe answers once"
    return {finding.probe: str(finding.outcome) for finding in findings}
