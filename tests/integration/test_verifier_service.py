"""The verifier as a process behind mutual TLS: the whole job, who may call, and how it starts, reloads and stops."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from common.audit.jws import untrusted_claims
from common.errors import InvalidInput, NotFound, Reason, Refused, SevattestError, Unavailable, WrongState
from common.rpc.client import call
from common.rpc.identity import Role
from emulator import channel as psp
from sevattest.v1 import platform_pb2, reason_pb2, verifier_service_pb2
from tests.support.chains import fresh_ca, make_platform
from tests.support.documents import CALLER, SECRET, write_document
from tests.support.documents import workload as document
from tests.support.eventually import until
from tests.support.verifier_process import ServingVerifier, VerifierSite
from verifier.keys.file import FileKey
from verifier.library.artefacts import ArtefactShelf
from verifier.library.documents import snapshot
from verifier.library.folder import read_folder
from verifier.library.prepared import prepare

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="sevattest-v-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def site(folder: Path) -> VerifierSite:
    return VerifierSite.make(folder)


@pytest.fixture
def served(site: VerifierSite) -> Iterator[ServingVerifier]:
    with site.serve() as serving:
        yield serving


@pytest.fixture
async def stub(site: VerifierSite, served: ServingVerifier) -> AsyncIterator[Any]:
    async with site.channel(served.address) as channel:
        yield site.stub(channel)


def begin(site: VerifierSite, **changes: Any) -> verifier_service_pb2.BeginLaunchRequest:
    fields: dict[str, Any] = {
        "request_id": str(uuid4()),
        "platform": platform_pb2.PlatformEvidence(chain=site.platform.chain.to_bytes()),
        "workload": "web",
    }
    return verifier_service_pb2.BeginLaunchRequest(**fields | changes)


def measured(
    site: VerifierSite, begun: Any, digest: bytes | None = None, index: int = 0, tik: bytes | None = None
) -> bytes:
    if digest is None:
        workload = snapshot(0, read_folder(site.folder / "documents")).workloads["web"][0]
        digest = prepare(workload, ArtefactShelf()).references[index].digest
    keys = psp.open_channel(pdh_key=site.platform.keys.pdh, godh=begun.godh, session=begun.session, policy=begun.policy)
    nonce = os.urandom(16)
    return psp.measure(tik or keys.tik, (1, 55), 24, begun.policy, digest, nonce) + nonce


def release(begun: Any, blob: bytes, **changes: Any) -> verifier_service_pb2.ReleaseSecretRequest:
    fields: dict[str, Any] = {
        "request_id": str(uuid4()),
        "launch_id": begun.launch.launch_id,
        "measurement": blob,
        "firmware": platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24),
    }
    return verifier_service_pb2.ReleaseSecretRequest(**fields | changes)


async def ask(method: Any, request: Any) -> Any:
    return await call(method, request, timeout=20, mutating=True)


async def refused(method: Any, request: Any) -> SevattestError:
    with pytest.raises(SevattestError) as caught:
        await ask(method, request)
    return caught.value


async def test_a_launch_from_begin_to_the_guests_secret(site: VerifierSite, stub: Any) -> None:
    begun = await ask(stub.BeginLaunch, begin(site))
    assert begun.launch.state == verifier_service_pb2.LAUNCH_STATE_OPEN
    assert begun.launch.platform.generation == "emulated"
    blob = measured(site, begun)
    request = release(begun, blob)
    released = await ask(stub.ReleaseSecret, request)
    assert await ask(stub.ReleaseSecret, request) == released
    keys = psp.open_channel(pdh_key=site.platform.keys.pdh, godh=begun.godh, session=begun.session, policy=begun.policy)
    table = psp.open_packet(
        keys,
        header=released.header,
        payload=released.payload,
        guest_length=len(released.payload),
        measurement=blob[:32],
    )
    assert SECRET in table
    said = untrusted_claims(released.receipt)["submods"]["sev"]["ear_verifier_claims"]
    assert said["sevattest.launch_id"] == begun.launch.launch_id
    shown = await ask(
        stub.GetLaunch, verifier_service_pb2.VerifierServiceGetLaunchRequest(launch_id=begun.launch.launch_id)
    )
    assert shown.launch.state == verifier_service_pb2.LAUNCH_STATE_RELEASED


async def test_every_refusal_travels_as_its_own_class(site: VerifierSite, stub: Any) -> None:
    begun = await ask(stub.BeginLaunch, begin(site))
    wrong = await refused(stub.ReleaseSecret, release(begun, measured(site, begun, bytes(32))))
    assert isinstance(wrong, Refused)
    assert wrong.reason is Reason.MEASUREMENT_REFUSED
    assert "audit_id" in wrong.fields
    spent = await refused(stub.ReleaseSecret, release(begun, measured(site, begun)))
    assert isinstance(spent, WrongState)
    unknown = await refused(stub.ReleaseSecret, release(begun, bytes(48), launch_id=str(uuid4())))
    assert isinstance(unknown, NotFound)
    forged = make_platform(ca=fresh_ca()).chain.to_bytes()
    root = await refused(stub.BeginLaunch, begin(site, platform=platform_pb2.PlatformEvidence(chain=forged)))
    assert root.reason is Reason.UNTRUSTED_ROOT


async def test_a_malformed_field_is_named(site: VerifierSite, stub: Any) -> None:
    chain = site.platform.chain.to_bytes()
    malformed: list[tuple[dict[str, Any], str]] = [
        ({"request_id": ""}, "request_id"),
        ({"request_id": str(uuid4()).upper()}, "request_id"),
        ({"platform": None}, "platform"),
        ({"platform": platform_pb2.PlatformEvidence(chain=b"x")}, "platform.chain"),
        ({"platform": platform_pb2.PlatformEvidence(chain=chain, chip_id=b"x")}, "platform.chip_id"),
        ({"workload": ""}, "workload"),
        ({"workload": "../web"}, "workload"),
        ({"grant": ""}, "grant"),
    ]
    for changes, field in malformed:
        error = await refused(stub.BeginLaunch, begin(site, **changes))
        assert isinstance(error, InvalidInput)
        assert error.fields["field"] == field


async def test_malformed_measurements_leave_the_launch_open(site: VerifierSite, stub: Any) -> None:
    begun = await ask(stub.BeginLaunch, begin(site))
    blob = measured(site, begun)
    for changes in (
        {"measurement": blob[:47]},
        {"measurement": b""},
        {"measurement": blob + b"\0"},
        {"firmware": None},
        {"firmware": platform_pb2.FirmwareVersion(api_major=257, api_minor=55, build=24)},
        {"launch_id": begun.launch.launch_id.upper()},
    ):
        assert isinstance(await refused(stub.ReleaseSecret, release(begun, blob, **changes)), InvalidInput)
    assert (await ask(stub.ReleaseSecret, release(begun, blob))).payload


async def test_an_abandoned_launch_is_shown_as_such(site: VerifierSite, stub: Any) -> None:
    begun = await ask(stub.BeginLaunch, begin(site))
    request = verifier_service_pb2.AbandonLaunchRequest(
        request_id=str(uuid4()), launch_id=begun.launch.launch_id, reason=reason_pb2.REASON_GUEST_GONE
    )
    answer = await ask(stub.AbandonLaunch, request)
    assert answer.launch.state == verifier_service_pb2.LAUNCH_STATE_ABANDONED
    assert answer.launch.reason == reason_pb2.REASON_GUEST_GONE
    assert (await refused(stub.ReleaseSecret, release(begun, bytes(48)))).reason is Reason.LAUNCH_ABANDONED


async def test_only_orchestrators_of_the_datacenter_are_served(site: VerifierSite, served: ServingVerifier) -> None:
    request = verifier_service_pb2.VerifierServiceGetLaunchRequest(launch_id=str(uuid4()))
    async with site.channel(served.address, name="other") as channel:
        assert (await refused(site.stub(channel).GetLaunch, request)).reason is Reason.NOT_FOUND
    async with site.channel(served.address, role=Role.OWNER) as channel:
        with pytest.raises(Unavailable):
            await call(site.stub(channel).GetLaunch, request, timeout=5, mutating=False)
    async with grpc.aio.insecure_channel(served.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await site.stub(channel).GetLaunch(request, timeout=5)


async def test_a_second_caller_is_told_that_the_workload_does_not_name_it(
    site: VerifierSite, served: ServingVerifier
) -> None:
    async with site.channel(served.address, name="other") as channel:
        error = await refused(site.stub(channel).BeginLaunch, begin(site))
        assert error.reason is Reason.CALLER_NOT_ALLOWED


async def test_a_caller_that_goes_away_leaves_no_half_launch(site: VerifierSite, stub: Any) -> None:
    outcomes = []
    for delay in (0, 0.001, 0.003, 0.01, 0.03):
        begun = await ask(stub.BeginLaunch, begin(site))
        request = release(begun, measured(site, begun))
        asked = stub.ReleaseSecret(request)
        await asyncio.sleep(delay)
        outcomes.append("cut" if asked.cancel() else "answered")
        # Whatever happened, the same request gets the one packet.
        first = await ask(stub.ReleaseSecret, request)
        assert await ask(stub.ReleaseSecret, request) == first
        other = await refused(stub.ReleaseSecret, release(begun, request.measurement))
        assert other.reason is Reason.ALREADY_RELEASED
    assert "cut" in outcomes


async def test_sighup_puts_new_documents_into_force_and_keeps_the_old_ones_when_they_are_bad(
    site: VerifierSite, served: ServingVerifier, stub: Any
) -> None:
    write_document(site.folder / "documents", document(callers=[]), "bad.yaml")
    served.process.send_signal(signal.SIGHUP)
    await until_logged(site, "documents.refused")
    assert (await ask(stub.BeginLaunch, begin(site))).launch.workload_version == "1"
    newer = document()
    newer["metadata"]["version"] = "2"
    write_document(site.folder / "documents", newer, "bad.yaml")
    served.process.send_signal(signal.SIGHUP)
    await until_logged(site, "verifier.reloaded")
    assert (await ask(stub.BeginLaunch, begin(site))).launch.workload_version == "2"


async def test_sighup_reads_the_deny_list_again(site: VerifierSite, served: ServingVerifier, stub: Any) -> None:
    fingerprint = site.platform.chain.cek.fingerprint.hex()
    site.config.write_text(site.config.read_text() + f'denied_chips = ["{fingerprint}"]\n')
    served.process.send_signal(signal.SIGHUP)
    await until_logged(site, "verifier.reloaded")
    assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CHIP_REVOKED
    assert "configuration.waits" not in (site.folder / "log").read_text()
    site.config.write_text(site.config.read_text() + "\n[limits]\ncalls = 2\n")
    served.process.send_signal(signal.SIGHUP)
    await until_logged(site, "verifier.reloaded", 2)
    assert '"settings":["limits.calls"]' in (site.folder / "log").read_text()


async def until_logged(site: VerifierSite, event: str, times: int = 1) -> None:
    log = site.folder / "log"
    try:
        await until(lambda: log.read_text().count(f'"event":"{event}"') >= times)
    except TimeoutError:
        raise AssertionError(log.read_text()) from None


async def test_a_bad_document_keeps_no_chip_off_the_deny_list(
    site: VerifierSite, served: ServingVerifier, stub: Any
) -> None:
    begun = await ask(stub.BeginLaunch, begin(site))
    blob = measured(site, begun)
    fingerprint = site.platform.chain.cek.fingerprint.hex()
    site.config.write_text(site.config.read_text() + f'denied_chips = ["{fingerprint}"]\n')
    write_document(site.folder / "documents", document(callers=[]), "bad.yaml")
    served.process.send_signal(signal.SIGHUP)
    await until_logged(site, "documents.refused")
    assert (await refused(stub.ReleaseSecret, release(begun, blob))).reason is Reason.CHIP_REVOKED


async def test_a_bad_configuration_keeps_no_document_out(
    site: VerifierSite, served: ServingVerifier, stub: Any
) -> None:
    newer = document()
    newer["metadata"]["version"] = "2"
    write_document(site.folder / "documents", newer, "newer.yaml")
    site.config.write_text(site.config.read_text() + 'denied_chips = ["x"]\n')
    served.process.send_signal(signal.SIGHUP)
    await until_logged(site, "configuration.refused")
    await until_logged(site, "documents.loaded", 2)
    assert (await ask(stub.BeginLaunch, begin(site))).launch.workload_version == "2"


async def test_a_chip_denied_by_its_id_while_serving_is_denied_by_its_key(folder: Path) -> None:
    site = VerifierSite.make(folder, extra='[kds]\nsource = "kds"')
    chip_id = site.platform.chip_id.hex()
    (folder / "kds").mkdir()
    (folder / "kds" / f"{chip_id.upper()}.cert").write_bytes(site.platform.chain.cek.raw)
    with site.serve() as serving:
        await until_logged(site, "deny_list.resolved")
        async with site.channel(serving.address) as channel:
            stub = site.stub(channel)
            begun = await ask(stub.BeginLaunch, begin(site))
            text = site.config.read_text().replace("[platforms]\n", f'[platforms]\ndenied_chips = ["{chip_id}"]\n')
            site.config.write_text(text)
            serving.process.send_signal(signal.SIGHUP)
            await until_logged(site, "deny_list.resolved", 2)
            # The host names no chip id, neither now nor at begin.
            assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CHIP_REVOKED
            blob = measured(site, begun)
            assert (await refused(stub.ReleaseSecret, release(begun, blob))).reason is Reason.CHIP_REVOKED


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verifier.cli", *words], capture_output=True, text=True, check=False, timeout=60
    )


async def test_the_audit_command_reads_while_the_verifier_serves(site: VerifierSite, stub: Any) -> None:
    begun = await ask(stub.BeginLaunch, begin(site))
    await refused(stub.ReleaseSecret, release(begun, measured(site, begun, bytes(32))))
    launch_id = begun.launch.launch_id
    text = await asyncio.to_thread(run, "audit", "--config", str(site.config), "--launch", launch_id)
    assert text.returncode == 0
    assert "launch.refused" in text.stdout
    assert "launch.measurement: " in text.stdout
    assert f"launch.refused  {launch_id}  MEASUREMENT_REFUSED  {CALLER}\n" in text.stdout
    assert "explanation: the measurement matches nothing on file" in text.stdout
    lines = await asyncio.to_thread(run, "audit", "--config", str(site.config), "--json")
    records = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [record["event"] for record in records] == ["launch.begun", "launch.refused"]
    assert records[1]["caller"] == CALLER
    one = await asyncio.to_thread(run, "audit", "--config", str(site.config), "--json", "--id", records[1]["audit_id"])
    assert ([json.loads(line) for line in one.stdout.splitlines()], one.returncode) == ([records[1]], 0)
    none = await asyncio.to_thread(run, "audit", "--config", str(site.config), "--id", launch_id)
    assert (none.stdout, none.stderr) == ("", f"sev-verifier: there is no record {launch_id}\n")
    assert none.returncode == 2


async def test_health_is_asked_over_the_socket(site: VerifierSite, served: ServingVerifier) -> None:
    ready = await asyncio.to_thread(run, "health", "--config", str(site.config))
    assert (ready.returncode, ready.stdout) == (0, "sev-verifier: ready\n")
    served.stop()
    gone = await asyncio.to_thread(run, "health", "--config", str(site.config))
    assert (gone.returncode, gone.stdout) == (3, "")
    assert gone.stderr.startswith("sev-verifier: nobody answers on the health socket ")


async def test_it_says_once_where_it_serves_names_emulated_roots_loudly_and_stops_cleanly(
    site: VerifierSite, served: ServingVerifier
) -> None:
    assert served.stop() == 0
    log = (site.folder / "log").read_text()
    events = [json.loads(line) for line in log.splitlines()]
    (loud,) = [event for event in events if event["event"] == "verifier.trusts_emulated_root"]
    assert loud["level"] == "warning"
    assert "EMULATED" in loud["text"]


async def test_a_second_verifier_on_the_same_state_is_refused(site: VerifierSite, served: ServingVerifier) -> None:
    second = await asyncio.to_thread(run, "serve", "--config", str(site.config))
    assert second.returncode == 3
    assert "another process serves from" in second.stderr
    assert served.process.poll() is None


async def test_another_key_file_is_refused_while_launches_are_open(site: VerifierSite) -> None:
    with site.serve() as serving:
        async with site.channel(serving.address) as channel:
            await ask(site.stub(channel).BeginLaunch, begin(site))
    (site.folder / "kek.bin").write_bytes(bytes(range(1, 33)))
    refused_start = await asyncio.to_thread(run, "serve", "--config", str(site.config))
    assert refused_start.returncode == 2
    key_id = FileKey(bytes(range(1, 33))).key_id.hex()
    assert "sealed under another key" in refused_start.stderr
    assert f"than the configured {key_id}\n" in refused_start.stderr


async def test_a_launch_outlives_a_restart_and_kill_9(site: VerifierSite) -> None:
    with site.serve() as first:
        async with site.channel(first.address) as channel:
            begun = await ask(site.stub(channel).BeginLaunch, begin(site))
        first.kill()
    request = release(begun, measured(site, begun))
    with site.serve() as second:
        async with site.channel(second.address) as channel:
            released = await ask(site.stub(channel).ReleaseSecret, request)
        second.kill()
    with site.serve() as third:
        async with site.channel(third.address) as channel:
            assert await ask(site.stub(channel).ReleaseSecret, request) == released


async def test_a_caller_that_is_refused_again_and_again_is_told_to_wait_and_what_it_began_goes_on(
    folder: Path,
) -> None:
    site = VerifierSite.make(folder, extra='[limits]\nrefusals = "2/1h"')
    forged = platform_pb2.PlatformEvidence(chain=make_platform(ca=fresh_ca()).chain.to_bytes())
    with site.serve() as serving:
        async with site.channel(serving.address) as channel:
            stub = site.stub(channel)
            begun = await ask(stub.BeginLaunch, begin(site))
            errors = [await refused(stub.BeginLaunch, begin(site, platform=forged)) for _ in range(6)]
            assert [error.reason for error in errors] == [Reason.UNTRUSTED_ROOT] * 2 + [Reason.TOO_MANY_REFUSALS] * 4
            assert 1790 <= int(errors[-1].fields["retry_after"]) <= 1800
            assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.TOO_MANY_REFUSALS
            assert (await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))).payload
    lines = [json.loads(line)["event"] for line in (folder / "log").read_text().splitlines()]
    assert lines.count("caller.turned_away") == 1
