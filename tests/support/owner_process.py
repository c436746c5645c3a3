"""A serving verifier with a listener for its owner, as a process of its own."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from common.rpc import MAX_ADMIN_MESSAGE
from common.rpc.client import open_channel
from common.rpc.identity import Role
from sevattest.v1 import verifier_admin_service_pb2_grpc
from tests.support.pki import OWNER_DOMAIN, Pki
from tests.support.verifier_process import ServingVerifier, VerifierSite

_START_TIMEOUT = 60.0


@dataclass(kw_only=True)
class OwnersVerifier:
    """A verifier that serves both.

    Attributes:
        site: its folder, identities and platform.
        process: the program.
        launches: where orchestrators call.
        admin: where its owner calls.
    """

    site: VerifierSite
    process: ServingVerifier
    launches: str
    admin: str

    def owner(self, *, role: Role = Role.OWNER, name: str = "alice") -> grpc.aio.Channel:
        """A channel to the owner's listener."""
        tls = self.site.pki.client_tls(role, name, server=Role.VERIFIER)
        return open_channel(self.admin, tls, message=MAX_ADMIN_MESSAGE)

    def stub(self, channel: grpc.aio.Channel) -> Any:
        """The generated client."""
        return verifier_admin_service_pb2_grpc.VerifierAdminServiceStub(channel)

    @property
    def environ(self) -> Mapping[str, str]:
        """What the owner's commands take from the environment."""
        return owner_environ(self.site.pki, self.admin)

    @property
    def log(self) -> str:
        """All that it logged."""
        return (self.site.folder / "log").read_text()


def owner_environ(pki: Pki, admin: str) -> dict[str, str]:
    """The variables that lead an owner's commands to a listener."""
    pair = pki.issue(Role.OWNER, "alice")
    return {
        "SEVATTEST_OWNER_ADMIN": admin,
        "SEVATTEST_OWNER_CERT": str(pair.cert),
        "SEVATTEST_OWNER_KEY": str(pair.key),
        "SEVATTEST_OWNER_CA": str(pki.owner_ca),
    }


@contextlib.contextmanager
def owners_verifier(extra: str = "") -> Iterator[OwnersVerifier]:
    """A verifier in a folder of its own, until the end; `extra` is more of its configuration."""
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="sevattest-o-"))
    try:
        pki_folder = folder / "pki"
        admin = f'[admin]\nlisten = "127.0.0.1:0"\nclient_ca = "{pki_folder}/owner-ca.pem"\n'
        site = VerifierSite.make(folder, extra=f'{admin}trust_domain = "{OWNER_DOMAIN}"\n{extra}')
        with (folder / "log").open("ab") as errors:
            words = [sys.executable, "-m", "verifier.cli", "serve", "--config", str(site.config)]
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=Path(__file__).parents[2]
            )
        with ServingVerifier(process=process, address="", log=folder / "log") as serving:
            yield OwnersVerifier(
                site=site,
                process=serving,
                admin=_announced(process, "serving owners on ", folder),
                launches=_announced(process, "serving on ", folder),
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _announced(process: subprocess.Popen[str], words: str, folder: Path) -> str:
    assert process.stdout is not None
    watchdog = threading.Timer(_START_TIMEOUT, process.kill)
    watchdog.start()
    line = process.stdout.readline()
    watchdog.cancel()
    if not line.startswith(f"sev-verifier: {words}"):
        raise AssertionError(f"the verifier said {line!r}: {(folder / 'log').read_text()}")
    return line.rsplit(" ", 1)[-1].strip()
