"""What a run of the hammer is to do, and what it counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.support.documents import grant, workload

GRANT = "hammered"
HAMMERED = "hammered"  # the property of a test's report that holds a run's counts
LIFETIME_S = 10  # of a launch: the shortest that a workload may have


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run. Whatever is left to chance is drawn from the seed; who wins a race is not.

    Attributes:
        seed: of all that is drawn.
        replicas: verifier processes; 1 over SQLite.
        launches: of the grant.
        at_once: of the grant.
        callers: that are at work at any time.
        identities: that they share.
        deaths: callers that die in the middle of a launch and never come back.
        lies: launches that are measured wrong.
        changes: launches that their callers give up.
        kills: of verifier processes by SIGKILL, all in all.
        restarts: of the database, as after a crash.
        boot: seconds that a guest takes from begin to its measurement, at least and at most.
        patience: seconds after which a run is given up, as where a reservation never comes back.
    """

    seed: int
    replicas: int
    launches: int = 100
    at_once: int = 8
    callers: int = 64
    identities: int = 8
    deaths: int = 5
    lies: int = 5
    changes: int = 8
    kills: int = 4
    restarts: int = 0
    boot: tuple[float, float] = (0.02, 0.3)
    patience: float = 80.0

    @cached_property
    def fates(self) -> Sequence[str]:
        """What becomes of the launches, in the order of their begins: good ones where the list ends."""
        # One in three dies with its release under way, the others before it.
        deaths = ["die late" if number % 3 == 2 else "die" for number in range(self.deaths)]
        bad = [*deaths, *["lie"] * self.lies, *["give up"] * self.changes]
        fates = [*bad, *["release"] * (self.launches * 3 // 4 - len(bad))]
        random.Random(f"{self.seed} fates").shuffle(fates)  # noqa: S311 -- not a secret
        return fates

    @property
    def names(self) -> Sequence[str]:
        """The orchestrators' names."""
        return [f"cluster-{number}" for number in range(self.identities)]

    @property
    def callers_on_file(self) -> list[str]:
        """Who may spend the grant."""
        return [f"spiffe://datacenter.example/orchestrator/{name}" for name in self.names]

    def documents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The workload, which nobody may launch by itself, and the grant."""
        measure = {
            "firmware": "ovmf.fd",
            "kernel": "kernel",
            "initrd": "initrd",
            "cmdline": "console=ttyS0",
            "vcpus": [1],
            "cpus": ["EPYC-Milan"],
            "flavours": ["legacy", "init2"],
        }
        return (
            workload(callers=None, measure=measure, lifetime=f"{LIFETIME_S}s"),
            grant(
                GRANT,
                callers=self.callers_on_file,
                launches=self.launches,
                at_once=self.at_once,
                refusals=self.lies + 1,
            ),
        )


@dataclass(kw_only=True)
class Answer:
    """What a caller was given for its launch.

    Attributes:
        launch_id: the launch.
        packets: header and payload of every answer that came.
        receipts: of every answer that came.
        opened: whether the guest could open the packet and found the secret.
    """

    launch_id: str
    packets: set[bytes] = field(default_factory=set)
    receipts: set[str] = field(default_factory=set)
    opened: bool = False


@dataclass(kw_only=True)
class Tally:
    """What happened, as those who made it happen saw it.

    Attributes:
        counts: how often, by what.
        answers: packets that callers got, by launch.
        samples: open launches by their rows, by the ledger, and what the ledger says is released; at one moment each.
        seconds: that the hammering took.
    """

    counts: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Answer] = field(default_factory=dict)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, what: str) -> None:
        """Count one."""
        self.counts[what] += 1
