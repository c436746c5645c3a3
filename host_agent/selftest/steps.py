"""The steps of the selftest, each one line; the first that fails is the last, save for the guest's end.

Nothing of the host's is believed: what it measures is compared with what its own files must give, what it signs is
verified, and a packet that was tampered with must be refused. The guest is not resumed unless that is asked for.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

from common.amd.kds import KeyService
from common.errors import InvalidInput, Reason, Refused, SevattestError
from common.rpc.steps import shielded
from common.sev.abi import KEY_SIZE
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import Root
from common.sev.certs.verify import CEK_PEK, OCA_OCA, OCA_PEK, PEK_PDH, check_links
from common.sev.digest.cpus import CpuType
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.policy import GuestPolicy
from common.sev.report import AttestationReport
from common.sev.throwaway import ThrowawayOwner
from host_agent.devices import Device, PlatformStatus
from host_agent.doctor.findings import Finding, Outcome, failed, passed, skipped
from host_agent.doctor.firmware import complete
from host_agent.hypervisors.base import GuestDefinition, Hypervisor, Inspection, Machine, SevState, StartOrder
from host_agent.selftest.expectation import Expectation, expect

SECRET_ID = UUID("5e1f7e57-0000-4000-8000-000000000001")
SECRET = b"nothing: this is a selftest of the host"
_REPORT_API = (0, 23)  # the first with ATTESTATION
_GONE = 10.0  # seconds that the firmware has to forget the guest
_POLL = 0.1
_PLATFORM_LINKS = (PEK_PDH, OCA_OCA, OCA_PEK, CEK_PEK)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tested.

    Attributes:
        device: the platform's.
        hypervisor: starts the guest.
        guest: its name.
        definition: its definition.
        state_dir: where its private folder is made, and removed again.
        policy: the guest policy.
        host_cpu: for `-cpu host`.
        key_service: has the signed CEK; None to leave the root out.
        roots: who may have signed it.
        resume: let the guest run at the end.
    """

    device: Device
    hypervisor: Hypervisor
    guest: str
    definition: GuestDefinition
    state_dir: Path
    policy: GuestPolicy
    host_cpu: CpuType | None
    key_service: KeyService | None
    roots: tuple[Root, ...]
    resume: bool


class _Stopped(Exception):
    """A step failed, and what comes after it makes no sense."""


class Selftest:
    """One run.

    Args:
        subject: what is tested.
        tell: takes each line as it comes.
    """

    def __init__(self, subject: Subject, tell: Callable[[Finding], None]) -> None:
        self._subject = subject
        self._tell = tell
        self._failed = False

    async def run(self) -> bool:
        """Go through the steps; returns whether none failed."""
        with suppress(_Stopped):
            await self._steps()
        return not self._failed

    async def _steps(self) -> None:
        subject = self._subject
        status = await self._platform()
        chain = await self._chain()
        expectation = self._expectation()
        owner = self._owner(chain)
        async with self._machine(owner, status) as machine:
            seen = await self._sev_state(machine, status)
            blob, digest = await self._measurement(machine, owner, seen.firmware, expectation)
            await self._secret(machine, owner, blob, expectation)
            await self._report(machine, chain, seen.firmware, digest)
            await self._pdh("pdh.unchanged", chain, "is the one that the session was made for")
            await self._last_look(machine, resume=subject.resume)

    # ------------------------------------------------------------------------------------------------------- platform

    async def _platform(self) -> PlatformStatus:
        with self._step("platform.answers"):
            status = await self._subject.device.status()
            version = "not told by this device" if status.firmware is None else str(status.firmware)
            self._pass("platform.answers", f"API and build {version}, {status.state.name}")
        return status

    async def _chain(self) -> PlatformChain:
        with self._step("chain.exported"):
            chain = PlatformChain.parse(await self._subject.device.export_chain())
            self._pass("chain.exported", f"PDH {chain.pdh.fingerprint.hex()}")
        links = check_links(chain, self._subject.roots)
        bad = [link for link in _PLATFORM_LINKS if not links.good(link)]
        with self._step("chain.links"):
            if bad:
                broken = ", ".join(f"{link.signer.name} does not sign the {link.signed.name}" for link in bad)
                raise Refused(Reason.BAD_SIGNATURE, broken)
            self._pass("chain.links", "PEK signs the PDH, OCA and CEK the PEK, OCA itself")
        await self._root(chain)
        await self._pdh("pdh.stable", chain, "comes out of a second export too")
        return chain

    async def _root(self, chain: PlatformChain) -> None:
        subject = self._subject
        if subject.key_service is None and not chain.cek.is_signed:
            advice = "--kds https://kdsintf.amd.com, or a folder with the CEK, shows whether the chip is AMD's"
            self._say(
                skipped("chain.root", "the firmware's CEK carries no signature, and no key service is named", advice)
            )
            return
        with self._step("chain.root"):
            service = subject.key_service
            platform = await complete(subject.device, chain, service, subject.roots)
            whose = "a root that is not AMD's" if platform.emulated else f"AMD's root of {platform.generation}"
            self._pass("chain.root", f"{whose} signs the chip {platform.chip_fingerprint.hex()}")

    async def _pdh(self, name: str, chain: PlatformChain, good: str) -> None:
        with self._step(name):
            again = PlatformChain.parse(await self._subject.device.export_chain())
            if again.pdh.fingerprint != chain.pdh.fingerprint:
                message = f"the platform has another PDH now, {again.pdh.fingerprint.hex()}"
                raise Refused(Reason.BAD_SIGNATURE, message, hint="something rotates the PDH: no session can fit")
            self._pass(name, f"the PDH {good}")

    # ---------------------------------------------------------------------------------------------------------- guest

    def _expectation(self) -> Expectation:
        subject = self._subject
        with self._step("guest.files"):
            found = expect(subject.definition, es=subject.policy.requires_es, host_cpu=subject.host_cpu)
            if found.firmware.footer.secret_area is None:
                message = "the firmware has no area for secrets: it is not an AmdSev build of OVMF"
                raise InvalidInput(Reason.INVALID_CONFIGURATION, message)
            shape = found.expected[0].shape.describe().partition(", VMSA")[0]
            self._pass("guest.files", f"firmware sha256 {found.firmware.sha256.hex()}; {shape}")
        return found

    def _owner(self, chain: PlatformChain) -> ThrowawayOwner:
        with self._step("session.made"):
            owner = ThrowawayOwner(chain.pdh, self._subject.policy, secrets.token_bytes)
            self._pass("session.made", f"for this PDH and policy {self._subject.policy}")
        return owner

    @asynccontextmanager
    async def _machine(self, owner: ThrowawayOwner, before: PlatformStatus) -> AsyncIterator[Machine]:
        """The guest's machine, started and paused; ended whatever happens."""
        subject = self._subject
        machine: Machine | None = None
        with self._folder() as folder:
            try:
                with self._step("guest.started"):
                    began = monotonic()
                    order = StartOrder(
                        launch=uuid4(),
                        guest=subject.guest,
                        policy=subject.policy.value,
                        godh=owner.session.godh.raw,
                        session=owner.session.blob,
                        folder=folder,
                    )
                    machine = await subject.hypervisor.create(order)
                    machine.release()
                    await _promptly(machine.wait_ready())
                    self._pass("guest.started", f"its monitor greets after {monotonic() - began:.1f} s")
                yield machine
            finally:
                if machine is not None:
                    await shielded(self._end(machine, before))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        state_dir = self._subject.state_dir
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="selftest-", dir=state_dir))
        except OSError as error:
            message = f"no folder can be made in {state_dir}: {error.strerror}"
            raise InvalidInput(Reason.INVALID_CONFIGURATION, message) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _end(self, machine: Machine, before: PlatformStatus) -> None:
        try:
            await machine.end()
            self._say(await self._forgotten(before))
        except SevattestError as error:
            self._say(failed("guest.ended", error.message, error.fields.get("hint", "look for its process")))
        finally:
            machine.close()

    async def _forgotten(self, before: PlatformStatus) -> Finding:
        """Whether the firmware has forgotten the guest whose process is gone."""
        deadline = monotonic() + _GONE
        while True:
            left = (await self._subject.device.status()).guest_count
            if left is None or before.guest_count is None:
                return skipped("guest.ended", "its process is gone; the firmware's guests are not told by this device")
            if left <= before.guest_count:
                return passed("guest.ended", "its process is gone, and the firmware has forgotten it")
            if monotonic() > deadline:
                message = f"the firmware knows {left} guests, before there were {before.guest_count}"
                return failed("guest.ended", message, "is another guest being started meanwhile?")
            await asyncio.sleep(_POLL)

    async def _sev_state(self, machine: Machine, status: PlatformStatus) -> Inspection:
        subject = self._subject
        with self._step("guest.sev_state"):
            seen = await machine.inspect()
            wrong = [
                sentence
                for holds, sentence in (
                    (seen.enabled, "SEV is not enabled"),
                    (seen.policy == subject.policy.value, f"the policy is 0x{seen.policy:x}"),
                    (seen.is_paused, f"the guest is {seen.status} ({seen.state}), not paused before its first step"),
                    (status.firmware in {None, seen.firmware}, f"query-sev says firmware {seen.firmware}"),
                )
                if not holds
            ]
            if wrong:
                raise Refused(Reason.MEASUREMENT_REFUSED, "; ".join(wrong))
            self._pass("guest.sev_state", f"{seen.state}, {seen.status}, firmware {seen.firmware}")
        return seen

    async def _measurement(
        self, machine: Machine, owner: ThrowawayOwner, firmware: FirmwareVersion, expectation: Expectation
    ) -> tuple[MeasurementBlob, bytes]:
        with self._step("measurement.read"):
            blob = MeasurementBlob.parse(await machine.measurement())
            self._pass("measurement.read", f"48 bytes, nonce {blob.nonce.hex()}")
        with self._step("measurement.matches"):
            digests = [each.shape.digest() for each in expectation.expected]
            index = owner.match(blob, firmware, digests)
            if index is None:
                why = owner.explain(blob, firmware, expectation.expected, expectation.catalogue)
                hint = "the guest is not what its definition's files and words say; docs/selftest.md lists the causes"
                raise Refused(Reason.MEASUREMENT_REFUSED, why, hint=hint)
            self._pass("measurement.matches", f"{expectation.expected[index].shape.describe()}")
        return blob, digests[index]

    async def _secret(
        self, machine: Machine, owner: ThrowawayOwner, blob: MeasurementBlob, expectation: Expectation
    ) -> None:
        area = expectation.firmware.footer.secret_area
        size = 0 if area is None else area.size
        with self._step("secret.tampered"):
            packet = owner.packet(SECRET_ID, SECRET, blob=blob, area_size=size)
            altered = bytes([packet.payload[0] ^ 1]) + packet.payload[1:]
            try:
                await machine.inject(packet.header, altered)
            except Refused:
                self._pass("secret.tampered", "a packet with one bit changed is refused")
            else:
                raise Refused(Reason.FIRMWARE_BAD_MEASUREMENT, "a packet with one bit changed was taken")
        with self._step("secret.injected"):
            await machine.inject(packet.header, packet.payload)
            self._pass("secret.injected", f"{len(packet.payload)} bytes, {SECRET_ID}")

    async def _report(self, machine: Machine, chain: PlatformChain, firmware: FirmwareVersion, digest: bytes) -> None:
        if firmware[:2] < _REPORT_API:
            self._say(skipped("report.verified", f"firmware {firmware} makes no attestation reports (API 0.23)"))
            return
        with self._step("report.verified"):
            nonce = secrets.token_bytes(KEY_SIZE)
            report = AttestationReport.parse(await machine.report(nonce))
            report.verify(chain.pek)
            wrong = [
                what
                for what, holds in (
                    ("nonce", report.nonce == nonce),
                    ("launch digest", report.digest == digest),
                    ("policy", report.policy == self._subject.policy),
                )
                if not holds
            ]
            if wrong:
                raise Refused(Reason.REPORT_REFUSED, f"signed by the PEK, but over another {' and '.join(wrong)}")
            self._pass("report.verified", f"the PEK signs digest {digest.hex()}, policy and our nonce")

    async def _last_look(self, machine: Machine, *, resume: bool) -> None:
        if not resume:
            with self._step("guest.paused"):
                seen = await machine.inspect()
                if not seen.is_paused:
                    raise Refused(Reason.MEASUREMENT_REFUSED, f"the guest is {seen.status} ({seen.state})")
                self._pass("guest.paused", "the guest has not run")
            return
        with self._step("guest.resumed"):
            await machine.resume()
            seen = await machine.inspect()
            if not seen.running or seen.state is not SevState.RUNNING:
                raise Refused(Reason.MEASUREMENT_REFUSED, f"the guest is {seen.status} ({seen.state})")
            self._pass("guest.resumed", "the guest runs")

    # ---------------------------------------------------------------------------------------------------------- lines

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """A step: what goes wrong in it is its line, and ends the run."""
        try:
            yield
        except SevattestError as error:
            advice = error.fields.get(
                "hint", "docs/selftest.md says what this line must say, and what else it may mean"
            )
            self._say(failed(name, error.message, advice))
            raise _Stopped from error

    def _pass(self, name: str, seen: str) -> None:
        self._say(passed(name, seen))

    def _say(self, finding: Finding) -> None:
        self._failed = self._failed or finding.outcome is Outcome.FAIL
        self._tell(finding)


async def _promptly(step: Coroutine[Any, Any, None]) -> None:
    """Await a step that may be long, so that a signal ends the wait at once.

    `asyncio.wait_for` of Python 3.11, which such steps are made of, now and then swallows a cancellation.
    """
    task = asyncio.ensure_future(step)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        task.add_done_callback(_forget)
        raise
    task.result()


def _forget(task: asyncio.Future[None]) -> None:
    """Nobody waits any more for what it came to."""
    if not task.cancelled():
        task.exception()
