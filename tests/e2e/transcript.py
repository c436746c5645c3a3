"""The transcripts in `docs/transcripts`: what `make demo` prints with a real QEMU and a real guest, as it was seen.

`python -m tests.e2e.transcript` writes them anew, and the excerpts in the README with them; the end-to-end run holds
what it sees against them, so that they never tell what is no longer so.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from orchestrator.demo.processes import script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "transcripts"
README = ROOT / "README.md"
# Name -> what the demonstration is asked for beside the guest's parts, and the exit code that it must end with.
STORIES = {"launch": ((), 0), "refused": (("--tamper=kernel",), 1)}
# Where an excerpt begins and, exclusively, ends.
_EXCERPTS = {"launch": ("The launch, step by step:", "\ndone in "), "refused": ("  measure ", "\nNo secret left:")}


def tell(name: str, guest: Path, qemu: Path | None) -> str:
    """What the demonstration prints.

    Args:
        name: of the story.
        guest: folder with the guest's parts.
        qemu: instead of the one on the PATH.
    """
    options, code = STORIES[name]
    words = [*script("sevattest"), "demo", "--machine", "qemu", "--guest", str(guest), *options]
    done = subprocess.run(
        words + (["--qemu", str(qemu)] if qemu else []), check=False, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (code, ""), (done.returncode, done.stderr)
    command = "make demo" + "".join(f" ARGS={option}" for option in options)
    # Where the parts lay is the machine's affair.
    return f"$ {command}\n" + re.sub(r"(?m)^(  firmware   ).*/(.*)$", r"\1\2", done.stdout)


def excerpt(name: str, transcript: str) -> str:
    """The part of a transcript that the README shows."""
    begin, end = _EXCERPTS[name]
    at = transcript.index(begin)
    return transcript[at : transcript.index(end, at)].rstrip() + "\n"


def block(name: str) -> re.Pattern[str]:
    """The README's block with that story's excerpt."""
    return re.compile(rf"(<!-- transcript: {name} -->\n```\n)(.*?)(```\n)", re.DOTALL)


def main() -> int:
    """Write every transcript, and the README's excerpts."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.transcript", description="renews docs/transcripts")
    parser.add_argument("--guest", type=Path, default=Path(".guest"))
    parser.add_argument("--qemu", type=Path)
    arguments = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    for name in STORIES:
        told = tell(name, arguments.guest, arguments.qemu)
        (FOLDER / f"{name}.txt").write_text(told, encoding="utf-8")
        shown = excerpt(name, told)
        readme = block(name).sub(lambda found, shown=shown: found[1] + shown + found[3], readme)  # type: ignore[misc]
    README.write_text(readme, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
