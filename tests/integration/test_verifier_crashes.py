"""kill -9 at every step of begin and release: a launch is released once, or never, and a repeat finds out which."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import OutcomeUnknown, Reason, SevattestError
from common.rpc.client import call
from sevattest.v1 import verifier_service_pb2
from tests.integration.test_verifier_service import begin, measured, release
from tests.support.verifier_process import VerifierSite
from verifier.store.sqlite import read_audit
from verifier.store.sqlite_file import FILE_NAME

pytestmark = pytest.mark.slow

BEGIN_STEPS = {
    "begin:judged": 0,
    "begin:keys-made": 0,
    "open:before-commit": 0,
    "open:after-commit": 1,
    "begin:stored": 1,
}
RELEASE_STEPS = {
    "release:judged": False,
    "release:packet-built": False,
    "move:before-commit": False,
    "move:after-commit": True,
    "release:stored": True,
}


@pytest.fixture
def site() -> Iterator[VerifierSite]:
    path = Path(tempfile.mkdtemp(prefix="sevattest-c-"))
    yield VerifierSite.make(path)
    shutil.rmtree(path, ignore_errors=True)


async def ask(method: Any, request: Any) -> Any:
    return await call(method, request, timeout=20, mutating=True)


def events(site: VerifierSite) -> list[str]:
    return [record.event for record in read_audit(site.folder / "state" / FILE_NAME, None)]


@pytest.mark.parametrize("step", BEGIN_STEPS)
async def test_a_begin_that_was_killed_is_one_launch_after_its_repeat(site: VerifierSite, step: str) -> None:
    request = begin(site)
    with site.serve(die_at=step) as dying:
        async with site.channel(dying.address) as channel:
            with pytest.raises(OutcomeUnknown):
                await ask(site.stub(channel).BeginLaunch, request)
        assert await dying.wait_dead() == -signal.SIGKILL
    assert events(site) == ["launch.begun"] * BEGIN_STEPS[step]
    with site.serve() as serving:
        async with site.channel(serving.address) as channel:
            stub = site.stub(channel)
            begun = await ask(stub.BeginLaunch, request)
            assert events(site) == ["launch.begun"]
            released = await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))
            assert released.payload


@pytest.mark.parametrize("step", RELEASE_STEPS)
async def test_a_release_that_was_killed_is_one_packet_after_its_repeat(site: VerifierSite, step: str) -> None:
    with site.serve(die_at=step) as dying:
        async with site.channel(dying.address) as channel:
            stub = site.stub(channel)
            begun = await ask(stub.BeginLaunch, begin(site))
            request = release(begun, measured(site, begun))
            with pytest.raises(OutcomeUnknown):
                await ask(stub.ReleaseSecret, request)
        assert await dying.wait_dead() == -signal.SIGKILL
    assert ("launch.released" in events(site)) is RELEASE_STEPS[step]
    with site.serve() as serving:
        async with site.channel(serving.address) as channel:
            stub = site.stub(channel)
            shown = await ask(
                stub.GetLaunch, verifier_service_pb2.VerifierServiceGetLaunchRequest(launch_id=begun.launch.launch_id)
            )
            done = shown.launch.state == verifier_service_pb2.LAUNCH_STATE_RELEASED
            assert done is RELEASE_STEPS[step]
            first = await ask(stub.ReleaseSecret, request)
            assert await ask(stub.ReleaseSecret, request) == first
            second_start = measured(site, begun)
            with pytest.raises(SevattestError) as caught:
                await ask(stub.ReleaseSecret, release(begun, second_start))
            assert caught.value.reason is Reason.ALREADY_RELEASED
    assert events(site).count("launch.released") == 1


@pytest.mark.parametrize("step", ["release:judged", "move:before-commit", "move:after-commit"])
async def test_a_refusal_that_was_killed_releases_nothing_after_its_repeat(site: VerifierSite, step: str) -> None:
    with site.serve(die_at=step) as dying:
        async with site.channel(dying.address) as channel:
            stub = site.stub(channel)
            begun = await ask(stub.BeginLaunch, begin(site))
            # Of a guest that was started without the session, which is explained before all else.
            request = release(begun, measured(site, begun, tik=bytes(16)), request_id=str(uuid4()))
            with pytest.raises(OutcomeUnknown):
                await ask(stub.ReleaseSecret, request)
        assert await dying.wait_dead() == -signal.SIGKILL
    with site.serve() as serving:
        async with site.channel(serving.address) as channel:
            with pytest.raises(SevattestError) as caught:
                await ask(site.stub(channel).ReleaseSecret, request)
            assert caught.value.reason is Reason.MEASUREMENT_REFUSED
    assert events(site) == ["launch.begun", "launch.refused"]
