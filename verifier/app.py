"""The composition root: reads the configuration, puts the parts together, serves until told to stop.

Nothing else in the package knows which store, key or secret source is in use (`verifier.parts` picks them). Life:
`App.start` → serving → `App.stop`; SIGTERM and SIGINT stop (calls under way end, nothing is cut in a transaction),
SIGHUP reads documents, deny-list and key files again, each for itself: a bad document keeps no chip off the deny-list,
nor does a bad configuration keep documents out.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from common.clock import Clock, SystemClock
from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from common.ids import ordered_uuid
from common.rpc.server import Limits, Server
from common.telemetry.endpoint import Endpoint
from common.telemetry.log import Log
from common.telemetry.metrics import UNMEASURED
from verifier import admin_service, chores, parts, service
from verifier.admin.desks import owner_desks
from verifier.config import AdminConfig, load_config, until_restart
from verifier.exchange import Denied, Keys
from verifier.keys.identities import Identities, load_identities
from verifier.keys.rewrap import Rewrap
from verifier.launches.allowances import Allowances
from verifier.launches.broker import Broker
from verifier.launches.dependencies import Dependencies, no_step
from verifier.launches.platforms import PlatformVerifier
from verifier.launches.records import Recorder
from verifier.launches.release import Releaser
from verifier.launches.reports import ReportVerifier
from verifier.launches.timekeeper import Timekeeper
from verifier.library.library import Library
from verifier.library.sealed import DocumentSeal
from verifier.readings import Readings

GRACE_S = 15.0
_GC_THRESHOLD = 10_000  # new objects between two looks: some twenty launches


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


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a verifier listens.

    Attributes:
        launches: for orchestrators.
        admin: for owners; None for nowhere.
    """

    launches: str
    admin: str | None


class App:
    """One verifier process."""

    def __init__(self, config_path: Path, log: Log, surroundings: Surroundings) -> None:
        """Read configuration, key files and roots; nothing is opened yet.

        Raises:
            InvalidInput: INVALID_CONFIGURATION.
        """
        self._path = config_path
        self._log = log
        self._world = surroundings
        self._config = load_config(config_path, surroundings.environ)
        self._roots, self._named = parts.trusted_roots(self._config)
        self._store = parts.make_store(self._config, surroundings.on_step)
        self._keys = Keys(self._config, self._store, log, self._task)
        self._service = parts.make_key_service(self._config, self._roots)
        self._denied = Denied(self._config, None if self._service is None else self._resolve)
        self._metrics = None if self._config.metrics is None else Endpoint(self._config.metrics, log)
        self._meter = UNMEASURED if self._metrics is None else self._metrics.meter
        self._server: Server | None = None
        self._admin: Server | None = None
        self._checkpoints: chores.Checkpoints | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self._seal: DocumentSeal  # these two from the start on: the seal's key is in the store
        self._library: Library
        self._started = asyncio.Event()

    async def start(self) -> Addresses:
        """Open everything and serve.

        Raises:
            InvalidInput: a document or setting cannot be used.
            Unavailable: the store or the key token cannot be used.
        """
        config = self._config
        await self._store.open()
        try:
            await self._keys.open()
            identities = await load_identities(self._store, self._keys.ring, self._world.random, self._log)
            self._seal = DocumentSeal(identities.documents.tag)
            sealed = await self._load()
            self._server = Server(
                listen=config.listen,
                tls=config.server_tls(),
                log=self._log,
                limits=Limits(in_flight=config.limits.calls),
                health_socket=None if config.health is None else config.health.socket,
                clock=self._world.clock,
                meter=self._meter,
            )
            self._admin = None if config.admin is None else self._owners_listener(config.admin)
            dependencies = self._dependencies(self._server, identities)
            broker = Broker(dependencies)
            service.add_to(
                self._server,
                service.VerifierServicer(broker, Releaser(dependencies), ReportVerifier(dependencies)),
            )
            if self._metrics is not None:
                await self._metrics.start()
            launches = await self._server.start()
            admin = None if self._admin is None else await self._start_admin(self._admin, dependencies)
        except BaseException:
            await self.stop()
            raise
        addresses = Addresses(launches=launches, admin=admin)
        self._banner(addresses)
        self._ready("documents", ready=sealed)
        self._spawn_chores(broker, dependencies)
        self._started.set()
        return addresses

    async def _load(self) -> bool:
        """Read all documents; False where the store's are not as they were sealed: then only owners get answers."""
        self._library = Library(self._config.documents, self._store, self._seal, self._log, before=self._denied.revoke)
        try:
            await self._library.load()
        except Unavailable as error:
            if error.reason is not Reason.DOCUMENTS_NOT_SEALED:
                raise
            return False
        return True

    def _owners_listener(self, admin: AdminConfig) -> Server:
        return Server(
            listen=admin.listen,
            tls=self._config.admin_tls(admin),
            log=self._log,
            limits=admin_service.LIMITS,
            clock=self._world.clock,
            meter=self._meter,
        )

    async def _start_admin(self, listener: Server, dependencies: Dependencies) -> str:
        desks = owner_desks(dependencies, self._library)
        admin_service.add_to(listener, admin_service.AdminServicer(desks))
        return await listener.start()

    @property
    def _single_ca(self) -> bool:
        """Whether one CA stands for both sites, at either listener."""
        return any(server is not None and server.single_ca for server in (self._server, self._admin))

    def _dependencies(self, server: Server, identities: Identities) -> Dependencies:
        world, config = self._world, self._config

        def new_id() -> UUID:
            return ordered_uuid(time.time_ns(), world.random(8))

        return Dependencies(
            store=self._store,
            library=self._library,
            platforms=PlatformVerifier(self._roots, self._service, self._log, world.clock),
            denied=self._denied.chips,
            sealing=self._keys.ring,
            signer=identities.signer,
            pseudonyms=identities.pseudonyms,
            seal=self._seal,
            issuer=str(server.identity),
            secrets=parts.make_secrets(config, self._store, self._keys.ring, world.random, self._log),
            time=Timekeeper(world.clock, self._store.last_time),
            records=Recorder(self._log, new_id, self._meter),
            allowances=Allowances(config.limits.allowance),
            random=world.random,
            new_id=new_id,
            open_cap=config.limits.open_launches,
            single_ca=self._single_ca,
            on_step=world.on_step,
        )

    def _spawn_chores(self, broker: Broker, dependencies: Dependencies) -> None:
        log = self._log
        self._checkpoints = chores.Checkpoints(
            store=self._store,
            signer=dependencies.signer,
            issuer=dependencies.issuer,
            time=dependencies.time,
            config=self._config.audit,
        )
        self._spawn(
            chores.sweep(
                broker=broker,
                store=self._store,
                time=dependencies.time,
                sealing=dependencies.sealing,
                checkpoints=self._checkpoints,
                documents=self._library.look,
                interval=self._config.limits.sweep_interval,
                ready=self._ready,
                log=log,
            )
        )
        if self._metrics is not None:
            readings = Readings(dependencies, self._library, self._checkpoints)
            readings.watch_with(self._meter)
            self._spawn(readings.keep(self._config.limits.sweep_interval))
        self._keys.keep_fresh()
        self._spawn(chores.rewrap(Rewrap(self._store, self._keys.ring, log), self._keys.changed, log))
        if self._service is not None:
            chips, changed = self._denied.chips, self._denied.changed
            self._spawn(chores.resolve_denied(chips, self._service, self._roots, changed, log))

    def _banner(self, addresses: Addresses) -> None:
        for path, root in self._named:
            self._log.warning(
                "verifier.trusts_emulated_root",
                text="PLATFORMS UNDER THIS ROOT ARE EMULATED: their memory is not encrypted",
                file=str(path),
                ark=root.ark.fingerprint.hex(),
            )
        if self._single_ca:
            self._log.warning(
                "verifier.single_ca", text="ONE CA STANDS FOR BOTH SITES: the datacenter can make any identity"
            )
        self._log.info(
            "verifier.serving",
            address=addresses.launches,
            admin=addresses.admin,
            roots=[root.generation for root in self._roots],
            sealing=self._keys.ring.key_id.hex(),
            store="sqlite" if self._config.store is None else "postgres",
            kds=None if self._config.kds is None else self._config.kds.source,
        )

    def _spawn(self, chore: Coroutine[object, object, None]) -> None:
        _ = self._task(chore)

    def _task(self, chore: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chore_ended)
        return task

    def _chore_ended(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect: say so, and let whoever watches over the process start it anew.
            self._log.error("verifier.chore_failed", error=error)
            self._ready("chores", ready=False)

    def _ready(self, cause: str, ready: bool) -> None:  # noqa: FBT001 -- a cause and whether it holds
        for server in (self._server, self._admin):
            if server is not None:
                server.health.set(cause, ready=ready)

    async def _resolve(self, chips: frozenset[str]) -> None:
        if self._service is not None:
            await self._denied.chips.resolve(self._service, self._roots, self._log, only=chips)

    async def reload(self) -> None:
        """Read configuration and documents again, each for itself; what is bad changes nothing and is logged."""
        await self._started.wait()
        # Of two SIGHUPs close together the later one ends last: what it read stays.
        async with self._reloading:
            await self._reload()

    async def _reload(self) -> None:
        good = await self._reload_config()
        try:
            await self._library.load()
        except SevattestError as error:
            good = False
            self._log.error("documents.refused", problems=list(error.sentences))
        try:
            # What is under way may have been judged by the files and the deny-list of before: it is judged again.
            await self._store.revise(self._seal)
        except SevattestError as error:
            good = False
            self._log.error("store.unavailable", error=error)
        if good:
            self._log.info("verifier.reloaded", sealing=self._keys.ring.key_id.hex())

    async def _reload_config(self) -> bool:
        try:
            config = load_config(self._path, self._world.environ)
        except InvalidInput as error:
            self._log.error("configuration.refused", error=error)
            return False
        if waiting := until_restart(self._config, config):
            self._log.warning("configuration.waits", settings=waiting, text="these count after a restart only")
        self._denied.configure(config)
        try:
            await self._keys.reload(config)
        except SevattestError as error:
            self._log.error("keys.refused", error=error)
            return False
        return True

    async def stop(self) -> None:
        """Take no more calls, let those under way end, sign the log's head, close the store."""
        servers = [server for server in (self._server, self._admin) if server is not None]
        await asyncio.gather(*(server.stop(GRACE_S) for server in servers))
        for chore in tuple(self._chores):
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        if self._checkpoints is not None:
            try:
                await self._checkpoints.finish()
            except SevattestError as error:
                self._log.error("audit.not_signed", error=error)
        if self._metrics is not None:
            await self._metrics.stop()
        await self._store.close()

    async def run(self, announce: Callable[[Addresses], None]) -> None:
        """Serve until SIGTERM or SIGINT; `announce` gets the bound addresses once."""
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        # From the first moment on: the default for SIGHUP is to die of it.
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self.reload()))
        addresses = await self.start()
        # What start has made stays: the collector need not look at it again, nor after every few hundred new objects.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        try:
            announce(addresses)
            await stopping.wait()
            self._log.info("verifier.stopping")
        finally:
            await self.stop()
