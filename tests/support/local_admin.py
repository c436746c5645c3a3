"""`sevattest owner` in this process, without a network: the real service over a desk, behind a channel that can fail.

Each command opens the desk in its folder and finds what the last one left, as a verifier does that is started anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

import orchestrator.drivers.admin
from common.errors import LimitExceeded, Reason, SevattestError
from common.rpc.identity import ActingAs, parse_spiffe_id
from common.rpc.status import to_status
from orchestrator.cli import main
from orchestrator.drivers.admin import VerifierAdmin
from tests.cli.transcripts import Said
from tests.support.owner_site import OWNER, OwnerSite, owner_site
from verifier.admin_service import AdminServicer

VARIABLES = ("SEVATTEST_OWNER_ADMIN", "SEVATTEST_OWNER_CERT", "SEVATTEST_OWNER_KEY", "SEVATTEST_OWNER_CA")


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        script: what happens to the next calls of a method, one after another; then all goes well. `unreachable` reaches
            nobody, `turned away` nobody who looks at it, `before` fails before there was any effect, `after` loses the
            answer.
        spoil: changes a method's answers on their way.
        requests: the requests that arrived, in order.
    """

    script: dict[str, list[str]] = field(default_factory=dict)
    spoil: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    requests: list[tuple[str, Any]] = field(default_factory=list)

    def next(self, method: str) -> str:
        """What happens to this call."""
        script = self.script.get(method)
        return script.pop(0) if script else ""


def lost(details: str) -> AioRpcError:
    """A connection that broke."""
    return AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), details=details)


def refused(error: SevattestError) -> AioRpcError:
    """What a client hears of an error of the service's."""
    status = to_status(error)
    trailing = Metadata(*(status.trailing_metadata or ()))
    return AioRpcError(status.code, Metadata(), trailing, details=status.details)


class LocalChannel:
    """A channel to a servicer in this process."""

    def __init__(self, servicer: object, faults: Faults) -> None:
        """Take the servicer and what goes wrong."""
        self._servicer = servicer
        self._faults = faults

    def unary_unary(self, path: str, **_codecs: Any) -> Callable[..., Any]:
        """What a generated stub asks for."""
        method = path.rsplit("/", 1)[-1]

        async def call(request: Any, *, timeout: float) -> Any:  # noqa: ASYNC109 -- grpc's own
            assert timeout > 0
            faults = self._faults
            fault = faults.next(method)
            if fault == "unreachable":
                raise lost("failed to connect to all addresses")
            if fault == "turned away":
                raise refused(LimitExceeded(Reason.TOO_MANY_REQUESTS, "too many"))
            # As it is now: a caller changes it for the next page.
            faults.requests.append((method, type(request).FromString(request.SerializeToString())))
            if fault == "before":
                raise lost("recvmsg: connection reset by peer")
            answer = await self._answer(method, request)
            if fault == "after":
                raise lost("recvmsg: connection reset by peer")
            return faults.spoil.get(method, lambda given: given)(answer)

        return call

    async def _answer(self, method: str, request: Any) -> Any:
        with ActingAs(parse_spiffe_id(OWNER)):
            try:
                return await getattr(self._servicer, method)(request, None)
            except SevattestError as error:
                raise refused(error) from error


@dataclass(kw_only=True)
class LocalAdmin:
    """The owner's commands, and the desk that they reach.

    Attributes:
        folder: the desk's.
        faults: what goes wrong.
        settings: of the desk.
    """

    folder: Path
    faults: Faults
    settings: Mapping[str, Any]
    _capture: pytest.CaptureFixture[str]

    def run(self, *words: str | Path) -> Said:
        """Run `sevattest owner` with these words."""
        self._capture.readouterr()
        code = main(["owner", *map(str, words)])
        out, err = self._capture.readouterr()
        return Said(out=out, err=err, code=code)

    def open(self) -> contextlib.AbstractAsyncContextManager[OwnerSite]:
        """The desk itself, between two commands."""
        return owner_site(self.folder, **self.settings)


def local_admin(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    timeout: float = 2.0,
    **settings: Any,
) -> LocalAdmin:
    """Put the desk in `folder` where the owner's commands look for a verifier; calls end after `timeout` seconds."""
    faults = Faults()

    @contextlib.asynccontextmanager
    async def open_admin(_target: str, _tls: object, **_more: object) -> AsyncIterator[VerifierAdmin]:
        async with owner_site(folder, **settings) as site:
            channel: Any = LocalChannel(AdminServicer(site.owner), faults)
            yield VerifierAdmin(channel, timeout=timeout)

    monkeypatch.setattr(orchestrator.drivers.admin, "open_admin", open_admin)
    for name in VARIABLES:
        monkeypatch.setenv(name, "unused")
    return LocalAdmin(folder=folder, faults=faults, settings=settings, _capture=capsys)
