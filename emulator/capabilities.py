"""What QEMU reads from the device when it is asked for the host's capabilities (target/i386/sev.c).

Apart from any launch: the device is opened for each question, so that the answer is the platform's of this moment.
"""

from __future__ import annotations

import base64
from pathlib import Path

from common.sev.abi import CHIP_ID_SIZE, PEK_OCA_CEK_SIZE, SEV_CERT_SIZE, DeviceCommand
from emulator import protocol
from emulator.device_client import CommandFailed, Device
from emulator.errors import CommandError
from emulator.qemu_words import ioctl_outcome, reason


def read_capabilities(platform: Path, *, cbitpos: int) -> dict[str, object]:
    """The members of `query-sev-capabilities`.

    Args:
        platform: the device socket.
        cbitpos: position of the encryption bit, which is CPUID's and not the device's.

    Raises:
        CommandError: with QEMU's words.
    """
    try:
        device = Device(platform)
    except (CommandFailed, OSError) as error:
        raise CommandError(f"SEV: Failed to open {platform}: {reason(error)}") from error
    with device:
        try:
            lengths = protocol.TWO_LENGTHS.pack(SEV_CERT_SIZE, PEK_OCA_CEK_SIZE)
            chain = device.issue(DeviceCommand.PDH_CERT_EXPORT, lengths)[protocol.TWO_LENGTHS.size :]
        except (CommandFailed, OSError) as error:
            raise CommandError(f"SEV: Failed to get PDH cert {ioctl_outcome(error)}") from error
        try:
            length = protocol.LENGTH.pack(CHIP_ID_SIZE)
            chip_id = device.issue(DeviceCommand.GET_ID2, length)[protocol.LENGTH.size :]
        except (CommandFailed, OSError) as error:
            raise CommandError(f"SEV: Failed to get ID {ioctl_outcome(error)}") from error
    return {
        "pdh": base64.b64encode(chain[:SEV_CERT_SIZE]).decode("ascii"),
        "cert-chain": base64.b64encode(chain[SEV_CERT_SIZE:]).decode("ascii"),
        "cpu0-id": base64.b64encode(chip_id).decode("ascii"),
        "cbitpos": cbitpos,
        "reduced-phys-bits": 1,
    }
