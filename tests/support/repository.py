"""Rules of the repository that no linter knows; `make lint` runs this file as a program.

1. The generated code is what proto/ generates today.
2. Lock files carry hashes and name no package index.
3. No tracked file holds a package index's address or a path of somebody's machine.
4. Nothing below common/gen is tracked.
5. Where the product tells a linter or the type checker to look away, it says why.
"""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hatch_build import generate  # noqa: E402  -- the path must be set first

# Written so that these patterns do not find themselves.
_INDEX_OPTION = re.compile(r"^--(extra-)?index-url|^--find-links", re.MULTILINE)
_INDEX_ADDRESS = re.compile(r"https?://[^\s/]*(py" + r"pi|pythonhosted|registry|mirror)")
_UNEXPLAINED = re.compile(r"# (type: ignore\[[\w, -]+\]|noqa: [A-Z0-9, ]+)$")
_MACHINE = re.compile(r"(?<!/proc/self)/(home/[a-z]|ro" + r"ot/|wo" + r"rk/|Users/[A-Za-z])")


def _tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def stale_generated_code() -> Iterator[str]:
    """Files of common/gen that differ from what proto/ generates."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "gen"
        generate(ROOT, fresh)
        stands = ROOT / "common" / "gen"
        names = {p.relative_to(base) for base in (fresh, stands) for p in base.rglob("*.py*") if p.suffix != ".pyc"}
        for name in sorted(names):
            both = (fresh / name).exists() and (stands / name).exists()
            if not both or not filecmp.cmp(fresh / name, stands / name, shallow=False):
                yield f"common/gen/{name}: not what proto/ generates today; run `make clean` and start again"


def weak_locks() -> Iterator[str]:
    """Lock files with an index's address, or with a package without hashes."""
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        text = lock.read_text(encoding="utf-8")
        if _INDEX_OPTION.search(text):
            yield f"{lock.relative_to(ROOT)}: names a package index"
        for entry in re.split(r"\n(?=\S)", text.strip()):
            if "--hash=sha256:" not in entry:
                yield f"{lock.relative_to(ROOT)}: {entry.splitlines()[0]!r} has no hash"


def leaked_addresses(files: list[Path]) -> Iterator[str]:
    """Tracked text with a package index's address or a machine's path."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for rule, what in ((_INDEX_ADDRESS, "a package index's address"), (_MACHINE, "a path of a machine")):
                if rule.search(line):
                    yield f"{path.relative_to(ROOT)}:{number}: holds {what}"


def tracked_generated_code(files: list[Path]) -> Iterator[str]:
    """Generated files that somebody committed."""
    for path in files:
        if path.is_relative_to(ROOT / "common" / "gen"):
            yield f"{path.relative_to(ROOT)}: generated code is built, not committed"


def unexplained(files: list[Path]) -> Iterator[str]:
    """Lines of the product that tell a linter or the type checker to look away, and not why."""
    for path in files:
        name = path.relative_to(ROOT)
        if path.suffix != ".py" or name.parts[0] == "tests":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if _UNEXPLAINED.search(line):
                yield f"{name}:{number}: says not why it is left out of a check"


def main() -> int:
    """Print every finding; 1 if there is one."""
    files = _tracked()
    findings = [
        *stale_generated_code(),
        *weak_locks(),
        *leaked_addresses(files),
        *tracked_generated_code(files),
        *unexplained(files),
    ]
    for finding in findings:
        print(finding)  # noqa: T201  -- a program of its own
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
