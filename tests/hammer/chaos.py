"""What happens to the verifiers and their database under the callers' hands: kill -9, and a crash of the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import grpc

from tests.hammer.plan import Plan, Tally
from tests.support.postgres import Server
from tests.support.verifier_process import NotServing, ServingVerifier, VerifierSite

_POLL_S = 0.005
_START_S = 60.0
_SHOWN = 4000  # characters of the log, where something went wrong


class Replica:
    """One verifier, its process now and those before it."""

    def __init__(self, site: VerifierSite, number: int, names: tuple[str, ...]) -> None:
        """Prepare the replica `number`, for orchestrators of these names."""
        self._site = site
        self._environ = {"SEVATTEST_HEALTH__SOCKET": f"h{number}.sock"}
        self._names = names
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: dict[str, Any] = {}
        self.serving: ServingVerifier | None = None

    async def start(self, tally: Tally) -> None:
        """Start a process, again and again as a service manager does, and let callers find it."""
        async with asyncio.timeout(_START_S):
            while self.serving is None:
                try:
                    self.serving = await asyncio.to_thread(self._site.serve, environ=self._environ)
                except NotServing as error:
                    if "the store cannot be reached" not in str(error):
                        raise
                    tally.add("starts without a database")
        for name in self._names:
            channel = self._site.channel(self.serving.address, name=name)
            # The old ones stay: whoever waits for an answer there learns by himself that it is lost.
            self._channels.append(channel)
            self._stubs[name] = self._site.stub(channel)

    def stub(self, name: str) -> Any:
        """What an orchestrator calls, also while nobody answers."""
        return self._stubs[name]

    async def kill(self) -> None:
        """End the process as `kill -9` does."""
        if self.serving is not None:
            serving, self.serving = self.serving, None
            await asyncio.to_thread(serving.kill)

    def must_live(self) -> None:
        """Fail where the process ended by itself."""
        code = None if self.serving is None else self.serving.process.poll()
        assert code is None, f"a verifier ended by itself: exit code {code}"

    async def stop(self) -> None:
        """End the process in peace."""
        if self.serving is not None:
            serving, self.serving = self.serving, None
            code = await asyncio.to_thread(serving.stop)
            assert code == 0, f"exit code {code}: {(self._site.folder / 'log').read_text()[-_SHOWN:]}"

    async def close(self) -> None:
        """Leave nothing behind."""
        await self.kill()
        for channel in self._channels:
            await channel.close()


class Replicas:
    """All of them; callers take any."""

    def __init__(self, replicas: list[Replica]) -> None:
        """Take them."""
        self.all = replicas

    def stub(self, name: str, draw: random.Random) -> Any:
        """See `callers.Verifiers`."""
        return draw.choice(self.all).stub(name)


class Chaos:
    """Kills and restarts, at moments that are drawn from how far the launches have come.

    Moments count launches and not seconds, so that a slow machine sees as much of it as a fast one.
    """

    def __init__(self, plan: Plan, tally: Tally, replicas: Replicas, server: Server | None) -> None:
        """Take the run, and what is to be hit."""
        self._plan = plan
        self._tally = tally
        self._replicas = replicas
        self._server = server
        self._over = False

    def stop(self) -> None:
        """Begin nothing new."""
        self._over = True

    async def watch(self) -> None:
        """Fail where a verifier ends that nobody killed."""
        while not self._over:
            for replica in self._replicas.all:
                replica.must_live()
            await asyncio.sleep(_POLL_S)

    async def rage(self) -> None:
        """Do all that is planned, as far as there is time; everything is up again afterwards."""
        each = [self._plan.kills // len(self._replicas.all) for _ in self._replicas.all]
        each[0] += self._plan.kills - sum(each)
        async with asyncio.TaskGroup() as group:
            for number, (replica, kills) in enumerate(zip(self._replicas.all, each, strict=True)):
                group.create_task(self._at_moments(f"replica {number}", kills, partial(self._kill, replica)))
            if self._server is not None:
                crash = partial(self._crash, self._server)
                group.create_task(self._at_moments("database", self._plan.restarts, crash))

    async def _at_moments(
        self, name: str, count: int, strike: Callable[[random.Random], Coroutine[Any, Any, None]]
    ) -> None:
        draw = random.Random(f"{self._plan.seed} {name}")  # noqa: S311 -- not a secret
        # One moment in each of `count` equal parts of the first nine tenths of the run.
        part = 0.9 * self._plan.launches / max(count, 1)
        for number in range(count):
            moment = part * (number + draw.random())
            while self._tally.counts["begun"] < moment:
                await asyncio.sleep(_POLL_S)
                if self._over:
                    return
            await asyncio.sleep(draw.uniform(0, 0.05))
            if not self._over:
                await strike(draw)

    async def _kill(self, replica: Replica, draw: random.Random) -> None:
        await replica.kill()
        self._tally.add("kills")
        await asyncio.sleep(draw.uniform(0, 0.2))
        await replica.start(self._tally)

    async def _crash(self, server: Server, draw: random.Random) -> None:
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(draw.uniform(0, 0.3))
        await asyncio.to_thread(server.start)
        self._tally.add("restarts of the database")
