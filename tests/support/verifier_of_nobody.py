"""`sev-verifier serve` as a user without privileges, who may read none of our files, where the tests are root's.

    python -m tests.support.verifier_of_nobody CONFIG

Everything is imported first. A change of user makes a process's memory private by itself (prctl(2), PR_SET_DUMPABLE);
that is taken back before the program begins, so what it is afterwards is the program's own doing.
"""

from __future__ import annotations

import ctypes
import sys

import verifier.app
import verifier.cli
from common.hardening import PR_SET_DUMPABLE
from tests.support.nobody import become_nobody
from verifier.store import sql_store
from verifier.store.migrations import migrations

_IMPORTED = verifier.app
_STEPS = migrations("sqlite")  # files of ours, read while they can be


def main(config: str) -> int:
    """Serve until told to stop."""
    setattr(sql_store, "migrations", lambda _dialect: _STEPS)  # noqa: B010 -- the type checker is right to complain
    become_nobody()
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    return verifier.cli.main(["serve", "--config", config])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
