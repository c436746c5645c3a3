"""An agent as a process on a software platform, and the test in the owner's place.

The owner's half is the project's own (`common.sev`), the firmware's half is the emulator's, written a second time: what
the guest writes to its serial line shows whether both agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import OutcomeUnknown, SevattestError, Unavailable
from common.ids import step_request_id
from common.rpc.client import call, open_channel
from common.rpc.identity import Role
from common.rpc.tls import ClientTls
from common.sev.certs.sev import SevCertificate
from common.sev.digest.compute import LaunchShape, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.measurement import FirmwareVersion, MeasurementBlob, match
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, SecretPacket, build_table, seal_packet
from common.sev.session import LaunchKeys, Session, open_session
from emulator.firmware_image import SECRET_AREA, write_image
from orchestrator.demo.processes import Service
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1.host_agent_service_pb2_grpc import HostAgentServiceStub
from tests.support.agent import alive
from tests.support.pki import DATACENTER_DOMAIN, Pki
from tests.support.platform import Platform

ES = GuestPolicy.parse(0x3701000F)
PLAIN = GuestPolicy.parse(0x0000000B)
CPU, VCPUS, CMDLINE = "EPYC-Milan", 2, "console=ttyS0"
SECRET_ID = UUID("43ced044-42ec-487a-88b7-261bda359f24")
REPOSITORY = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Owner:
    """The guest owner of one launch.

    Attributes:
        launch_id: as the verifier would give it.
        policy: the guest policy.
        pdh: the platform's.
        secret: what the guest is to read.
    """

    pdh: SevCertificate
    policy: GuestPolicy = ES
    launch_id: UUID = field(default_factory=uuid4)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    keys: LaunchKeys = field(default_factory=lambda: LaunchKeys.generate(secrets.token_bytes))
    session: Session = field(init=False)
    packet: SecretPacket | None = None

    def __post_init__(self) -> None:
        self.session = open_session(
            pdh=self.pdh,
            policy=self.policy,
            keys=self.keys,
            godh_key=ec.generate_private_key(ec.SECP384R1()),
            nonce=secrets.token_bytes(16),
            iv=secrets.token_bytes(16),
        )

    def accepts(self, answer: pb.GetMeasurementResponse, shape: LaunchShape) -> bool:
        """Whether the measurement is that of a guest of this shape."""
        blob = MeasurementBlob.parse(answer.measurement)
        version = answer.firmware
        firmware = FirmwareVersion(version.api_major, version.api_minor, version.build)
        digests = [shape.digest()]
        return match(tik=self.keys.tik, blob=blob, firmware=firmware, policy=self.policy, digests=digests) == 0

    def release(self, answer: pb.GetMeasurementResponse, shape: LaunchShape) -> SecretPacket:
        """The packet for a measurement that is the expected one; the same one when asked again."""
        assert self.accepts(answer, shape)
        blob = MeasurementBlob.parse(answer.measurement)
        if self.packet is None:
            self.packet = seal_packet(
                keys=self.keys,
                table=build_table([SecretEntry(guid=SECRET_ID, data=self.secret)]),
                measurement=blob.measurement,
                iv=secrets.token_bytes(16),
                area_size=SECRET_AREA[1],
            )
        return self.packet


class Site:
    """Configuration, artefacts and processes in a short folder of their own."""

    def __init__(self, root: Path, platform: Platform, pki: Pki) -> None:
        self.root = root
        self.platform = platform
        self.pki = pki
        self.firmware = root / "OVMF.amdsev.fd"
        write_image(self.firmware, "one")
        self.kernel = root / "vmlinuz"
        self.kernel.write_bytes(b"kernel")
        self.initrd = root / "initrd"
        self.initrd.write_bytes(b"initrd")
        self.serial = root / "serial"
        self.config = root / "agent.toml"
        self.settings: dict[str, object] = {}
        self.by_ioctl = False
        self.qemu: dict[str, object] = {}
        self.tables = ""
        self.program = platform.machine()
        self.vcpus = VCPUS
        self.boots_directly = True
        self.more_args: list[str] = []
        self.services: list[Service] = []
        self.path = [str(REPOSITORY)]

    def write_config(self) -> None:
        """Write `agent.toml`."""
        agent = self.pki.issue(Role.AGENT, ip=["127.0.0.1"])
        device = 'driver = "dev_sev"' if self.by_ioctl else f'driver = "socket"\npath = "{self.platform.socket}"'
        self.config.write_text(
            f"""\
listen = "127.0.0.1:0"
state_dir = "state"
[tls]
cert = "{agent.cert}"
key = "{agent.key}"
client_ca = "{self.pki.datacenter_ca}"
trust_domain = "{DATACENTER_DOMAIN}"
[health]
socket = "health.sock"
[device]
{device}
[qemu]
{_lines(self.qemu)}
[launches]
{_lines(self.settings)}
{self.tables}
{self.guest()}
"""
        )

    def guest(self) -> str:
        """The guest's part of `agent.toml`, with what its driver has besides."""
        boot = ("-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", CMDLINE)
        args = [
            *("-machine", "q35", "-cpu", CPU, "-smp", str(self.vcpus), "-m", "256M"),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *(boot if self.boots_directly else ()),
            *("-serial", f"file:{self.serial}"),
            *self.more_args,
        ]
        return f"""\
[guests.web]
program = {json.dumps(self.program)}
firmware = "{self.firmware}"
args = {json.dumps(args)}"""

    def use_dev_sev(self) -> None:
        """Configure the ioctl's driver. Under `platform run` nothing is pinned, whatever the guest's size."""
        self.by_ioctl = True
        self.qemu["check_memlock"] = "false"

    def shape(self, policy: GuestPolicy = ES) -> LaunchShape:
        """What the owner expects."""
        es = policy.requires_es
        hashes = KernelHashes.of(
            sha256(self.kernel.read_bytes()).digest(), sha256(self.initrd.read_bytes()).digest(), CMDLINE.encode()
        )
        return LaunchShape(
            firmware=measure_firmware([self.firmware.read_bytes()]),
            hashes=hashes if self.boots_directly else None,
            vcpus=self.vcpus if es else None,
            cpu=parse_cpu(CPU) if es else None,
            flavour=Flavour.LEGACY if es else None,
        )

    def start(self, point: str | None = None) -> Service:
        """Start the agent; with `point`, one that kills itself there. Does not wait for it."""
        self.write_config()
        if point is None:
            command = [sys.executable, "-c", "import sys; from host_agent.cli import main; sys.exit(main())"]
            command += ["serve", "--config", str(self.config)]
        else:
            command = [sys.executable, "-m", "tests.support.agent_with_faults", str(self.config), point]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(self.path)}
        service = Service("sev-host-agent", command, logs=self.root, environ=environ)
        self.services.append(service)
        service.start()
        return service

    @contextlib.asynccontextmanager
    async def caller(self, service: Service, name: str = "alice") -> AsyncIterator[Caller]:
        """An orchestrator with a channel to the agent, which is waited for."""
        address = service.where or service.wait_ready()
        pair = self.pki.issue(Role.ORCHESTRATOR, name)
        tls = ClientTls(cert=pair.cert, key=pair.key, server_ca=self.pki.datacenter_ca)
        async with open_channel(address, tls) as channel:
            yield Caller(HostAgentServiceStub(channel))

    def machines(self) -> list[int]:
        """Processes that belong to a launch of this site, found by what the agent puts into their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                marked = b"SEV_HOST_AGENT_LAUNCH=" in (entry / "environ").read_bytes()
                here = (entry / "cwd").readlink().is_relative_to(self.root)
                if marked and here and alive(pid):
                    found.append(pid)
        return found

    def end(self) -> None:
        """End every process of this site."""
        for service in self.services:
            service.kill()
        for pid in self.machines():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    @property
    def read_by_guest(self) -> list[str]:
        """What the guest has written to its serial line."""
        return self.serial.read_text().splitlines() if self.serial.exists() else []


def _lines(table: Mapping[str, object]) -> str:
    return "\n".join(f"{key} = {value}" for key, value in table.items())


def _launch(answer: Any) -> pb.GuestLaunch:
    launch: pb.GuestLaunch = answer.launch
    return launch


class Caller:
    """The orchestrator's calls, with the request ids that it would find again after a restart."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub

    async def __call__(self, method: str, request: Any) -> Any:
        return await call(getattr(self.stub, method), request, timeout=40, mutating=True)

    async def pdh(self) -> SevCertificate:
        """The platform's PDH."""
        exported = await self("ExportChain", pb.ExportChainRequest())
        return SevCertificate.parse(exported.platform.chain[:2084])

    async def start(self, owner: Owner, **changes: Any) -> pb.GuestLaunch:
        """StartLaunch."""
        fields: dict[str, Any] = {
            **self._ids(owner, "start"),
            "guest": "web",
            "policy": owner.policy.value,
            "godh": owner.session.godh.raw,
            "session": owner.session.blob,
            "pdh_fingerprint": owner.pdh.fingerprint,
        }
        return _launch(await self("StartLaunch", pb.StartLaunchRequest(**{**fields, **changes})))

    async def measure(self, owner: Owner) -> pb.GetMeasurementResponse:
        """GetMeasurement."""
        answer: pb.GetMeasurementResponse = await self(
            "GetMeasurement", pb.GetMeasurementRequest(launch_id=str(owner.launch_id))
        )
        return answer

    async def inject(self, owner: Owner, packet: SecretPacket) -> pb.GuestLaunch:
        """InjectSecret."""
        request = pb.InjectSecretRequest(**self._ids(owner, "inject"), header=packet.header, payload=packet.payload)
        return _launch(await self("InjectSecret", request))

    async def resume(self, owner: Owner) -> pb.GuestLaunch:
        """ResumeGuest."""
        return _launch(await self("ResumeGuest", pb.ResumeGuestRequest(**self._ids(owner, "resume"))))

    async def abort(self, owner: Owner) -> pb.GuestLaunch:
        """AbortLaunch."""
        return _launch(await self("AbortLaunch", pb.AbortLaunchRequest(**self._ids(owner, "abort"))))

    async def get(self, owner: Owner) -> pb.GuestLaunch:
        """GetLaunch."""
        request = pb.HostAgentServiceGetLaunchRequest(launch_id=str(owner.launch_id))
        return _launch(await self("GetLaunch", request))

    async def whole(self, owner: Owner, shape: LaunchShape) -> pb.GuestLaunch:
        """The whole launch, from StartLaunch to a running guest."""
        await self.start(owner)
        packet = owner.release(await self.measure(owner), shape)
        await self.inject(owner, packet)
        return await self.resume(owner)

    async def whole_again(self, owner: Owner, shape: LaunchShape) -> pb.GuestLaunch:
        """What an orchestrator does after a crash: the same requests from the first; gives up on a launch's end."""
        for _ in range(5):
            try:
                return await self.whole(owner, shape)
            except (OutcomeUnknown, Unavailable):
                continue
            except SevattestError:
                return await self.get(owner)
        raise AssertionError("the launch went nowhere")

    def _ids(self, owner: Owner, step: str) -> dict[str, str]:
        return {"request_id": str(step_request_id(owner.launch_id, step)), "launch_id": str(owner.launch_id)}


@contextlib.contextmanager
def agent_site(platform: Platform, pki: Pki) -> Iterator[Site]:
    """A site in a folder short enough for a socket's path; nothing of it is left afterwards."""
    root = Path(tempfile.mkdtemp(prefix="sevattest-agent-"))
    site = Site(root, platform, pki)
    try:
        yield site
    finally:
        site.end()
        shutil.rmtree(root, ignore_errors=True)
