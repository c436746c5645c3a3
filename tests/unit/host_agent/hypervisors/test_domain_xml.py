"""A guest's domain: libvirt's own schema on what the agent makes, and a sentence for what it refuses."""

from __future__ import annotations

import base64
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree as ET

import pytest

from common.errors import InvalidInput
from host_agent.hypervisors.arguments import MachineOptions
from host_agent.hypervisors.domain_xml import check_domain, launch_xml
from tests.support.stages import domain

OPTIONS = MachineOptions(firmware=Path("/srv/OVMF.fd"), cbitpos=51, reduced_phys_bits=1, policy=0x3701000F)
QEMU = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 -- our own


def made(text: str) -> str:
    check_domain("guests.web.domain", text)
    return launch_xml(text, OPTIONS, launch=uuid4(), godh=bytes(2084), session=bytes(range(128)))


def schema_says(text: str, folder: Path) -> str:
    """What libvirt's schema says of a domain; empty where it is valid."""
    tool = shutil.which("virt-xml-validate")
    if tool is None or shutil.which("xmllint") is None:
        pytest.skip("no virt-xml-validate: install the packages libvirt-clients and libxml2-utils")
    file = folder / "domain.xml"
    file.write_text(text)
    done = subprocess.run([tool, str(file), "domain"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_libvirts_schema_accepts_the_whole_domain(tmp_path: Path) -> None:
    assert schema_says(made(domain(Path("/srv"))), tmp_path) == ""


def test_libvirts_schema_would_notice_what_is_wrong(tmp_path: Path) -> None:
    wrong = made(domain(Path("/srv"))).replace("<cbitpos>51</cbitpos>", "<cbitpos>far</cbitpos>")
    assert schema_says(wrong, tmp_path) != ""


def test_the_owners_fields_are_the_agents_to_fill() -> None:
    whole = parsed(made(domain(Path("/srv"))))
    security = whole.find("launchSecurity")
    assert security is not None
    assert security.attrib == {"type": "sev", "kernelHashes": "yes"}
    fields = {child.tag: child.text for child in security}
    assert fields == {
        "cbitpos": "51",
        "reducedPhysBits": "1",
        "policy": "0x3701000f",
        "dhCert": base64.b64encode(bytes(2084)).decode(),
        "session": base64.b64encode(bytes(range(128))).decode(),
    }
    loader = whole.find("os/loader")
    assert loader is not None
    assert loader.text == "/srv/OVMF.fd"
    assert loader.attrib == {"readonly": "yes", "stateless": "yes", "type": "pflash"}


def test_hashes_are_on_only_where_there_is_a_kernel() -> None:
    text = domain(Path("/srv"))
    start, end = text.index("<kernel>"), text.index("</os>")
    security = parsed(made(text[:start] + text[end:])).find("launchSecurity")
    assert security is not None
    assert security.attrib == {"type": "sev"}


def test_a_firmware_path_with_markup_in_it_stays_text() -> None:
    options = replace(OPTIONS, firmware=Path("/srv/<a>&'b'.fd"))
    text = launch_xml(domain(Path("/srv")), options, launch=uuid4(), godh=b"g", session=b"s")
    assert parsed(text).findtext("os/loader") == "/srv/<a>&'b'.fd"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("</domain>", "<uuid>11111111-2222-4333-8444-555555555555</uuid></domain>", "UUID is the launch's id"),
        (
            "</domain>",
            "<launchSecurity type='sev'><policy>0x1</policy></launchSecurity></domain>",
            "come from the owner",
        ),
        ("</os>", "<loader>/x</loader></os>", "flash image is the agent's"),
        ("</os>", "<nvram>/x</nvram></os>", "not measured"),
        ("</os>", "<firmware><feature enabled='no' name='secure-boot'/></firmware></os>", "must not choose one"),
        ("<os>", "<os firmware='efi'>", "must not choose one"),
        ("</os>", "<shim>/x</shim></os>", "a shim is not measured"),
        ("</domain>", f"<qemu:commandline {QEMU}><qemu:arg value='-x'/></qemu:commandline></domain>", "not checked"),
        ("</domain>", f"<qemu:override {QEMU}/></domain>", "not checked"),
        ("type='kvm'", "type='qemu'", "type must be kvm"),
        ("hvm", "xen", "must be hvm"),
        ("<acpi/>", "", "needs <features><acpi/></features>"),
        ("<name>web</name>", "", "needs a <name>"),
        ("<kernel>/srv/vmlinuz", "<kernel>vmlinuz", "must be an absolute path"),
        ("<domain", "<!DOCTYPE x [<!ENTITY a 'b'>]><domain", "no document type"),
        ("<domain", "<network", "is not XML"),
        ("domain>", "network>", "is not XML"),
    ],
)
def test_what_a_definition_may_not_say_is_refused_with_the_reason(old: str, new: str, words: str) -> None:
    text = domain(Path("/srv"))
    check_domain("guests.web.domain", text)
    assert old in text
    with pytest.raises(InvalidInput, match=words):
        check_domain("guests.web.domain", text.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "x", "<domain", "<network/>", "\0", "<a>" * 5000])
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        check_domain("guests.web.domain", text)
