"""libvirt's domain XML: what a guest's definition may say, and what the agent adds to it for one launch.

The same rules as for a command line (`arguments.py`): what decides what is measured, and under which session, is the
agent's. A definition that says any of it itself is refused when the configuration is loaded. The firmware is one
read-only, stateless flash image: variables (NVRAM) are not measured. Where the domain has a kernel, its hashes are.

The domain's UUID is the launch's id. So a domain that has it is the launch's own and no other, whatever its name is.

Pure code. Format: libvirt's formatdomain page and schemas (domain.rng); `stateless` is known since libvirt 8.6,
`kernelHashes` since 8.0.
"""

from __future__ import annotations

import base64
from pathlib import PurePath
from uuid import UUID

# The standard library's parser: what it reads is the operator's own file, and a document type is refused before.
from xml.etree import ElementTree as ET

from common.errors import InvalidInput, Reason
from host_agent.hypervisors.arguments import MachineOptions

_REFUSED = {
    "uuid": "the domain's UUID is the launch's id",
    "launchSecurity": "policy, session and handle come from the owner, launch by launch",
    "os/loader": "the firmware's flash image is the agent's; name the image as the guest's firmware",
    "os/nvram": "variables (NVRAM) are not measured; the guest's firmware must be stateless",
    "os/firmware": "the agent names the firmware's image itself; libvirt must not choose one",
    "os/shim": "a shim is not measured",
    "{http://libvirt.org/schemas/domain/qemu/1.0}commandline": "arguments behind libvirt's back are not checked",
    "{http://libvirt.org/schemas/domain/qemu/1.0}override": "properties behind libvirt's back are not checked",
    "{http://libvirt.org/schemas/domain/qemu/1.0}capabilities": "what QEMU can is not to be pretended",
}
_NAME_MAX = 128


def check_domain(where: str, text: str) -> None:
    """Check a guest's domain XML.

    Args:
        where: the key in the configuration, for messages.
        text: the file's content.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; names the element and says why.
    """
    domain = _parsed(where, text)
    if domain.get("type") != "kvm":
        raise _bad(where, "the domain's type must be kvm")
    name = domain.findtext("name", "").strip()
    if not 0 < len(name) <= _NAME_MAX:
        raise _bad(where, "the domain needs a <name>")
    for path, why in _REFUSED.items():
        if domain.find(path) is not None:
            raise _bad(where, f"<{path.rpartition('}')[2]}>: {why}")
    system = domain.find("os")
    if system is None or system.findtext("type", "").strip() != "hvm":
        raise _bad(where, "<os><type> must be hvm")
    if system.get("firmware") is not None:
        raise _bad(where, f"<os firmware>: {_REFUSED['os/firmware']}")
    if domain.find("features/acpi") is None:
        raise _bad(where, "needs <features><acpi/></features>: libvirt gives no flash image to a machine without it")
    for key in ("kernel", "initrd"):
        named = system.findtext(key)
        if named is not None and not PurePath(named.strip()).is_absolute():
            raise _bad(where, f"<os><{key}>: must be an absolute path")


def launch_xml(text: str, options: MachineOptions, *, launch: UUID, godh: bytes, session: bytes) -> str:
    """The whole domain of one launch.

    Args:
        text: the guest's definition, checked.
        options: what the agent adds.
        launch: the launch's id.
        godh: the owner's certificate.
        session: the session blob.
    """
    domain = _parsed("domain", text)
    _add(domain, "uuid", str(launch))
    system = domain.find("os")
    assert system is not None  # noqa: S101 -- it was checked
    _add(system, "loader", str(options.firmware), readonly="yes", stateless="yes", type="pflash")
    hashes = {} if system.find("kernel") is None else {"kernelHashes": "yes"}
    security = ET.SubElement(domain, "launchSecurity", {"type": "sev", **hashes})
    _add(security, "cbitpos", str(options.cbitpos))
    _add(security, "reducedPhysBits", str(options.reduced_phys_bits))
    _add(security, "policy", f"0x{options.policy:04x}")
    _add(security, "dhCert", base64.b64encode(godh).decode())
    _add(security, "session", base64.b64encode(session).decode())
    return ET.tostring(domain, encoding="unicode")


def _parsed(where: str, text: str) -> ET.Element:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise _bad(where, "a domain has no document type")
    try:
        domain = ET.fromstring(text)  # noqa: S314 -- see the import
    except (ET.ParseError, ValueError, RecursionError) as error:
        raise _bad(where, f"is not XML: {error}") from error
    if domain.tag != "domain":
        raise _bad(where, "is not a libvirt domain")
    return domain


def _add(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _bad(where: str, why: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{where}: {why}", key=where)
