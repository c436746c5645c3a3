"""The systemd service that the agent runs in, and whether the machines end with it.

A machine is to outlive its agent. In a service with KillMode=control-group, systemd's default, it does not: it is ended
with the service's other processes, unless `systemd-run --scope` has put it into a unit of its own before it began.

Sources: cgroups(7) for /proc/self/cgroup, systemd.kill(5), systemd-run(1). What is read and asked comes in as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

_TAKES_ALONG = frozenset({"control-group", "mixed"})
_USER_MANAGER = re.compile(r"user@\d+\.service")
_SCOPE_RUNNER = "systemd-run"

ADVICE = "set KillMode=process in the unit, or start the machines with `systemd-run --scope` (docs/host-agent.md)"


@dataclass(frozen=True, kw_only=True)
class Service:
    """A service of systemd's.

    Attributes:
        name: the unit's.
        of_user: it is a user's own manager's, not the system's.
    """

    name: str
    of_user: bool

    @property
    def question(self) -> list[str]:
        """The command that asks how it is ended; `kill_mode` reads the answer."""
        whose = ["--user"] if self.of_user else []
        return ["systemctl", *whose, "show", "--property=KillMode", "--", self.name]


def service_of(cgroup: str) -> Service | None:
    """The service that a process runs in; None for none, and for a scope (a session, a container).

    Args:
        cgroup: its /proc/PID/cgroup.
    """
    for line in cgroup.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # systemd's own tree: the only one of cgroup v2, or the one by that name.
        if (hierarchy, controllers) != ("0", "") and controllers != "name=systemd":
            continue
        units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
        if units and units[-1].endswith(".service"):
            return Service(name=units[-1], of_user=any(_USER_MANAGER.fullmatch(unit) for unit in units[:-1]))
    return None


def kill_mode(answer: str) -> str | None:
    """The KillMode that systemctl tells of; None where it tells nothing."""
    found = re.search(r"^KillMode=([a-z-]+)$", answer, re.MULTILINE)
    return None if found is None else found[1]


def takes_along(mode: str) -> bool:
    """Whether everything in a service with this KillMode ends when the service does."""
    return mode in _TAKES_ALONG


def is_scope_runner(program: Sequence[str]) -> bool:
    """Whether a program's first word is systemd-run, wherever it is."""
    return bool(program) and PurePath(program[0]).name == _SCOPE_RUNNER


def has_own_scope(program: Sequence[str]) -> bool:
    """Whether a machine's program is `systemd-run --scope …`, which keeps the pid and leaves the agent's unit."""
    return is_scope_runner(program) and "--scope" in _own_options(program)


def at_risk(programs: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the guests whose machines stay in the agent's unit.

    Args:
        programs: by guest, what the agent starts.
    """
    return sorted(name for name, program in programs.items() if not has_own_scope(program))


def _own_options(program: Sequence[str]) -> list[str]:
    """The words of systemd-run before the command that it runs."""
    words = list(program[1:])
    return words[: words.index("--")] if "--" in words else words
