"""What a service does to itself before anything else: no core dump, no reader of its memory, no private file for all.

prctl(2) PR_SET_DUMPABLE, setrlimit(2) RLIMIT_CORE. Best effort by nature: root reads everything.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping

from common.errors import InvalidInput, PlatformFailed, Reason

# include/uapi/linux/prctl.h
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4


def harden_process(environ: Mapping[str, str] | None = None) -> None:
    """Call first in a service, and again in nothing: it holds until the next exec.

    Afterwards the process leaves no core, processes of the same user cannot read its memory or environment, and the
    files that it makes are its owner's only.

    Args:
        environ: where forbidden variables are looked for; `os.environ` when None.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; `GRPC_TRACE` is set, which could put messages into the log.
        PlatformFailed: `INTERNAL`; the kernel refused.
    """
    variables = os.environ if environ is None else environ
    if variables.get("GRPC_TRACE"):
        raise InvalidInput(Reason.INVALID_CONFIGURATION, "environment: GRPC_TRACE must not be set for a service")
    # Before grpc is imported, or it has no effect; the same default as in common.rpc.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise PlatformFailed(Reason.INTERNAL, f"prctl(PR_SET_DUMPABLE): {os.strerror(ctypes.get_errno()).lower()}")
