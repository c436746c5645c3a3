"""The wire vectors of simple-kbs that lie in tests/vectors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def kbs_wire() -> dict[str, dict[str, Any]]:
    """The vectors by name; tests/vectors/README.md says where they come from."""
    path = Path(__file__).resolve().parents[1] / "vectors" / "kbs-wire-vectors.json"
    vectors: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return vectors
