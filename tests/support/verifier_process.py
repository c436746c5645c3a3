"""`sev-verifier serve` as a real process behind mutual TLS, with an owner's folder that a test may edit.

`with_faults` starts the same program with a hook that kills it (SIGKILL) at a named step: the hook is installed here,
by this module run as a program; the product has no switch for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import grpc

from common.rpc.client import open_channel
from common.rpc.identity import Role
from sevattest.v1 import verifier_service_pb2_grpc
from tests.support.chains import SyntheticPlatform, make_platform
from tests.support.desk import KEK
from tests.support.documents import SECRET, write_artefacts, write_document
from tests.support.documents import workload as document
from tests.support.pki import DATACENTER_DOMAIN, OWNER_DOMAIN, Pki
from tests.support.spellings import leaks
from verifier.config import load_config
from verifier.parts import make_store

_START_TIMEOUT = 60.0


class NotServing(AssertionError):
    """A verifier ended before it served; its log is in the message."""


@dataclass(kw_only=True)
class VerifierSite:
    """An owner's folder with everything that a verifier needs.

    Attributes:
        folder: the owner's.
        pki: both sites' identities.
        platform: the host's; the configuration names its root.
    """

    folder: Path
    pki: Pki
    platform: SyntheticPlatform
    config: Path = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.folder / "verifier.toml"

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        content: dict[str, Any] | None = None,
        extra: str = "",
        dsn: str | None = None,
        owners: bool = False,
        environ: Mapping[str, str] | None = None,
        init: bool = True,
    ) -> VerifierSite:
        """Write configuration, key file, documents, root and identities, and make the store.

        Args:
            folder: where to; must be short enough for a socket's path.
            content: the workload document; `document()` for the caller `cluster` if absent.
            extra: more of the configuration.
            dsn: of the PostgreSQL to keep everything in; SQLite if absent.
            owners: whether owners are served too.
            environ: more of the environment, where settings of the store can be overridden.
            init: whether the store is made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        site = cls(folder=folder, pki=Pki(folder / "pki"), platform=make_platform())
        write_artefacts(folder / "documents")
        write_document(folder / "documents", content or document())
        (folder / "ask_ark.cert").write_bytes(site.platform.ca.to_bytes())
        key_file = folder / "kek.bin"
        key_file.touch(mode=0o600)
        key_file.write_bytes(KEK)
        server = site.pki.issue(Role.VERIFIER, "v")
        store, tables = 'state_dir = "state"', ""
        if dsn is not None:
            (folder / "dsn").touch(mode=0o600)
            (folder / "dsn").write_text(dsn)
            store, tables = "", '[store]\npostgres = "dsn"\n'
        if owners:
            tables += (
                f'[admin]\nlisten = "127.0.0.1:0"\nclient_ca = "{site.pki.owner_ca}"\ntrust_domain = "{OWNER_DOMAIN}"\n'
            )
        site.config.write_text(
            f"""\
listen = "127.0.0.1:0"
{store}
documents = "documents"
key_file = "kek.bin"

[tls]
cert = "{server.cert}"
key = "{server.key}"
client_ca = "{site.pki.datacenter_ca}"
trust_domain = "{DATACENTER_DOMAIN}"

[health]
socket = "h.sock"

[platforms]
extra_roots = ["ask_ark.cert"]
{tables}{extra}
"""
        )
        if init:
            site.init(environ)
        return site

    def init(self, environ: Mapping[str, str] | None = None) -> None:
        """Make the store where there is none, also where an event loop runs."""
        store = make_store(load_config(self.config, {**os.environ, **(environ or {})}))

        async def make() -> None:
            try:
                await store.open(make=True)
            finally:
                await store.close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(make())).result()

    def channel(self, address: str, *, name: str = "cluster", role: Role = Role.ORCHESTRATOR) -> grpc.aio.Channel:
        """A client's channel to a serving verifier."""
        return open_channel(address, self.pki.client_tls(role, name, server=Role.VERIFIER))

    def stub(self, channel: grpc.aio.Channel) -> Any:
        """The generated client."""
        return verifier_service_pb2_grpc.VerifierServiceStub(channel)

    def serve(
        self,
        *,
        die_at: str | None = None,
        environ: Mapping[str, str] | None = None,
        under: Sequence[str] = (),
        as_nobody: bool = False,
    ) -> ServingVerifier:
        """Start the program, and return when it serves.

        Args:
            die_at: the step at which it kills itself.
            environ: more of the environment, where settings can be overridden.
            under: a command that becomes the program.
            as_nobody: as a user without privileges, if we are root.
        """
        words = [*under, sys.executable, "-m", "verifier.cli", "serve", "--config", str(self.config)]
        if die_at is not None:
            words = [*under, sys.executable, "-m", "tests.support.verifier_process", str(self.config), die_at]
        elif as_nobody:
            words = [*under, sys.executable, "-m", "tests.support.verifier_of_nobody", str(self.config)]
        log = self.folder / "log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=Path(__file__).parents[2],
                env={**os.environ, **(environ or {})},
            )
        assert process.stdout is not None
        watchdog = threading.Timer(_START_TIMEOUT, process.kill)
        watchdog.start()
        said: dict[str, str] = {}
        for line in process.stdout:
            what, _, address = line.strip().rpartition(" on ")
            said[what.removeprefix("sev-verifier: ")] = address
            if "serving" in said:
                break
        watchdog.cancel()
        if "serving" not in said:
            process.kill()
            process.communicate()
            raise NotServing(f"the verifier did not start: {log.read_text()}")
        return ServingVerifier(process=process, address=said["serving"], admin=said.get("serving owners"), log=log)


@dataclass(kw_only=True)
class ServingVerifier:
    """The running program.

    Attributes:
        process: itself.
        address: for orchestrators.
        admin: for owners.
        log: where it logs to; looked through for the secrets of all tests when it has ended.
    """

    process: subprocess.Popen[str]
    address: str
    admin: str | None = None
    log: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def kill(self) -> None:
        """SIGKILL: no step of the process's own runs after it."""
        self.process.kill()
        self.process.communicate()
        self._require_discreet()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=_START_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self._require_discreet()
        return self.process.returncode

    def _require_discreet(self) -> None:
        """Whatever a test was about: what it logged holds neither its key file nor a guest's secret."""
        if self.log is not None and self.log.exists():
            assert leaks({"KEK": KEK, "secret": SECRET}, {"log": self.log.read_bytes()}) == []

    async def wait_dead(self) -> int:
        """The exit code of a process that is about to die."""
        return await asyncio.to_thread(self.process.wait, _START_TIMEOUT)


def proc(pid: int, name: str) -> bytes:
    """What the kernel tells the root of a process."""
    return Path(f"/proc/{pid}/{name}").read_bytes()


def killer(step: str) -> Callable[[str], None]:
    """A hook that kills this process at `step`, as `kill -9` would."""

    def hook(reached: str) -> None:
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    return hook


def main(config: str, die_at: str) -> None:
    """Serve with a hook that kills the process at one step."""
    from common.telemetry.log import configure
    from verifier.app import App, real_surroundings

    async def serve() -> None:
        surroundings = replace(real_surroundings(), on_step=killer(die_at))
        app = App(Path(config), configure("sev-verifier"), surroundings)
        await app.run(lambda at: print(f"sev-verifier: serving on {at.launches}", flush=True))  # noqa: T201 -- as serve does

    asyncio.run(serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
