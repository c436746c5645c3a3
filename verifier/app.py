"""The composition root: reads the configuration, picks the implementations, serves until told to stop.

Nothing else in the package knows which store, key or secret source is in use. Life: `App.start` → serving → `App.stop`;
SIGTERM and SIGINT stop (calls under way end, nothing is cut in a transaction), SIGHUP reads documents and deny-list
again. A set of documents with one that is bad changes nothing but keeps no chip off the deny-list; nor does a bad
configuration keep documents out.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from common.amd.kds import KeyService, key_service
from common.clock import Clock, SystemClock
from common.errors import InvalidInput, Reason, SevattestError
from common.rpc.server import Limits, Server
from common.sev.certs.roots import Root, named_root, pinned_roots
from common.telemetry.log import Log
from verifier.config import Config, load_config
from verifier.documents.text import InvalidDocument
from verifier.keys.base import SealingKey
from verifier.keys.file import read_key_file
from verifier.launches.broker import Broker
from verifier.launches.dependencies import Dependencies, no_step
from verifier.launches.platforms import DenyList, PlatformVerifier
from verifier.launches.records import Recorder
from verifier.launches.release import REPEATS, Releaser
from verifier.launches.reports import ReportVerifier
from verifier.launches.timekeeper import Timekeeper
from verifier.library.library import Library
from verifier.secrets.file import FileSecrets
from verifier.service import VerifierServicer, add_to
from verifier.store.sqlite import SqliteStore

GRACE_S = 15.0
# A key service that did not answer is asked again for the deny-list's chips after this time.
_RESOLVE_AGAIN_S = 600.0


def trusted_roots(config: Config) -> tuple[tuple[Root, ...], tuple[tuple[Path, Root], ...]]:
    """All roots, and those among them that only the configuration names.

    Raises:
        InvalidInput: a file cannot be read or holds no root.
    """
    named = []
    for path in config.platforms.extra_roots:
        try:
            root = named_root(path.read_bytes())
        except OSError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"platforms.extra_roots: {path}: {(error.strerror or '').lower()}"
            ) from error
        except SevattestError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"platforms.extra_roots: {path}: {error.message}"
            ) from error
        if root.emulated:
            named.append((path, root))
    return (*pinned_roots(), *(root for _, root in named)), tuple(named)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a test may put in place of the world.

    Attributes:
        environ: variables that override the configuration.
        clock: the time.
        random: random bytes.
        on_step: called between steps of begin and release; crash tests kill the process there.
    """

    environ: Mapping[str, str]
    clock: Clock
    random: Callable[[int], bytes]
    on_step: Callable[[str], None] = no_step


def real_surroundings() -> Surroundings:
    """The world."""
    return Surroundings(environ=os.environ, clock=SystemClock(), random=os.urandom)


class App:
    """One verifier process."""

    def __init__(self, config_path: Path, log: Log, surroundings: Surroundings) -> None:
        """Read configuration, key file and roots; nothing is opened yet.

        Raises:
            InvalidInput: INVALID_CONFIGURATION.
        """
        self._path = config_path
        self._log = log
        self._world = surroundings
        self._config = load_config(config_path, surroundings.environ)
        self._roots, self._named = trusted_roots(self._config)
        self._sealing: SealingKey = read_key_file(self._config.key_file)
        self._denied = DenyList(self._config.platforms.denied_chips)
        self._library = Library(self._config.documents, log)
        self._store = SqliteStore(self._config.state_dir, on_step=surroundings.on_step)
        self._service = self._key_service()
        self._server: Server | None = None
        self._broker: Broker | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._denied_changed = asyncio.Event()

    def _key_service(self) -> KeyService | None:
        kds = self._config.kds
        return None if kds is None else key_service(kds.source, kds.cache, roots=self._roots)

    async def start(self) -> str:
        """Open everything and serve; the bound address.

        Raises:
            InvalidInput: a document or setting cannot be used.
            Unavailable: the store cannot be used.
        """
        config = self._config
        await self._library.load()
        await self._store.open()
        try:
            await self._require_key()
            self._server = Server(
                listen=config.listen,
                tls=config.server_tls(),
                log=self._log,
                limits=Limits(in_flight=config.limits.calls),
                health_socket=None if config.health is None else config.health.socket,
                clock=self._world.clock,
            )
            dependencies = await self._dependencies(single_ca=self._server.single_ca)
            self._broker = Broker(dependencies)
            add_to(self._server, VerifierServicer(self._broker, Releaser(dependencies), ReportVerifier(dependencies)))
            address = await self._server.start()
        except BaseException:
            await self._store.close()
            raise
        self._banner(address)
        self._spawn(self._sweep())
        if self._service is not None:
            self._spawn(self._resolve_denied(self._service))
        return address

    async def _require_key(self) -> None:
        strange = await self._store.sealing_keys() - {self._sealing.key_id}
        if strange:
            names = ", ".join(sorted(key.hex() for key in strange))
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"key_file: open launches are sealed under another key ({names})",
                hint="put that key file back, or wait until these launches have expired under it",
            )

    async def _dependencies(self, *, single_ca: bool) -> Dependencies:
        world = self._world
        return Dependencies(
            store=self._store,
            workloads=self._library,
            platforms=PlatformVerifier(self._roots, self._service, self._log),
            denied=self._denied,
            sealing=self._sealing,
            secrets=FileSecrets(world.random, self._log),
            time=Timekeeper(world.clock, await self._store.last_time()),
            records=Recorder(self._log, uuid4),
            random=world.random,
            new_id=uuid4,
            open_cap=self._config.limits.open_launches,
            single_ca=single_ca,
            on_step=world.on_step,
        )

    def _banner(self, address: str) -> None:
        for path, root in self._named:
            self._log.warning(
                "verifier.trusts_emulated_root",
                text="PLATFORMS UNDER THIS ROOT ARE EMULATED: their memory is not encrypted",
                file=str(path),
                ark=root.ark.fingerprint.hex(),
            )
        if self._server is not None and self._server.single_ca:
            self._log.warning(
                "verifier.single_ca", text="ONE CA STANDS FOR BOTH SITES: the datacenter can make any identity"
            )
        self._log.info(
            "verifier.serving",
            address=address,
            roots=[root.generation for root in self._roots],
            sealing=self._sealing.key_id.hex(),
            kds=None if self._config.kds is None else self._config.kds.source,
        )

    def _spawn(self, chore: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chore_ended)

    def _chore_ended(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect: say so, and let whoever watches over the process start it anew.
            self._log.error("verifier.chore_failed", error=error)
            self._ready("chores", ready=False)

    async def _sweep(self) -> None:
        """Ends launches whose time ran out, erases packets a day after release, watches the store."""
        while True:
            try:
                if self._broker is not None:
                    await self._broker.expire_overdue()
                await self._store.erase_packets(self._world.clock.now() - REPEATS)
                await self._store.flush_erased()
                await self._store.check()
                self._ready("store", ready=True)
            except SevattestError as error:
                self._ready("store", ready=False)
                self._log.error("store.unavailable", error=error)
            await asyncio.sleep(self._config.limits.sweep_interval)

    async def _resolve_denied(self, service: KeyService) -> None:
        """Learns the keys behind denied chip ids: at start, when the list changes, and again where there was no answer.

        Apart from the sweep: a key service that is slow to answer must not keep spent keys on the disk.
        """
        while True:
            self._denied_changed.clear()
            complete = await self._denied.resolve(service, self._roots, self._log)
            with suppress(TimeoutError):
                async with asyncio.timeout(None if complete else _RESOLVE_AGAIN_S):
                    await self._denied_changed.wait()

    def _ready(self, cause: str, *, ready: bool) -> None:
        if self._server is not None:
            self._server.health.set(cause, ready=ready)

    async def reload(self) -> None:
        """Read deny-list and documents again, each for itself; what is bad changes nothing and is logged."""
        good = True
        try:
            denied = load_config(self._path, self._world.environ).platforms.denied_chips
        except InvalidInput as error:
            good = False
            self._log.error("configuration.refused", error=error)
        else:
            self._denied.set_owners(denied)
            self._denied_changed.set()
        try:
            await self._library.load()
        except InvalidDocument as error:
            good = False
            self._log.error("documents.refused", problems=list(error.problems))
        if good:
            self._log.info("verifier.reloaded", denied_chips=len(denied))

    async def stop(self) -> None:
        """Take no more calls, let those under way end, close the store."""
        if self._server is not None:
            await self._server.stop(GRACE_S)
        for chore in tuple(self._chores):
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await self._store.close()

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT; `announce` gets the bound address once."""
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        # From the first moment on: the default for SIGHUP is to die of it.
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self.reload()))
        address = await self.start()
        try:
            announce(address)
            await stopping.wait()
            self._log.info("verifier.stopping")
        finally:
            await self.stop()
