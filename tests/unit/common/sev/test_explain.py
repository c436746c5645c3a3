"""What the search of known neighbours finds, and what it must not claim to know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache

import pytest

from common.sev.digest.compute import LaunchShape, MeasuredFirmware, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.explain import Catalogue, Expected, Explanation, explain
from common.sev.measurement import FirmwareVersion, MeasurementBlob, measure
from common.sev.policy import GuestPolicy
from common.sev.session import LaunchKeys
from tests.support.firmware import amdsev_image, with_footer

_KEYS = LaunchKeys(tek=b"\x01" * 16, tik=b"\x02" * 16)
_NONCE = bytes(range(16))
_VERSION = FirmwareVersion(1, 55, 24)
_POLICY = GuestPolicy.parse(0x3701000F)
_SEV_POLICY = GuestPolicy.parse(0x3701000B)
_ROME = parse_cpu("EPYC-Rome")


@cache
def _firmware(label: str) -> MeasuredFirmware:
    return measure_firmware([amdsev_image(label)])


def _sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


_CMDLINES = {"demo/1": b"console=ttyS0", "demo/2": b"console=ttyS0 quiet", "demo/3": b"debug"}
_CATALOGUE = Catalogue(
    firmwares={label: _firmware(label) for label in ("demo/1", "demo/2")},
    kernels={label: _sha(f"kernel {label}") for label in ("demo/1", "demo/2", "demo/3")},
    initrds={label: _sha(f"initrd {label}") for label in ("demo/1", "demo/2")},
    cmdlines=_CMDLINES,
)


@dataclass(frozen=True, kw_only=True)
class _Guest:
    """What is really launched; the defaults are what is expected."""

    firmware: MeasuredFirmware = _firmware("demo/2")  # noqa: RUF009 -- a frozen value
    kernel: str | None = "kernel demo/2"
    initrd: str | None = "initrd demo/2"
    cmdline: bytes | None = _CMDLINES["demo/2"]
    vcpus: int | None = 8
    cpu: str = "EPYC-Rome"
    flavour: Flavour = Flavour.LEGACY
    policy: GuestPolicy = _POLICY
    version: FirmwareVersion = _VERSION
    tik: bytes = _KEYS.tik

    def hashes(self) -> KernelHashes | None:
        if self.kernel is None:
            return None
        initrd = None if self.initrd is None else _sha(self.initrd)
        return KernelHashes.of(_sha(self.kernel), initrd, self.cmdline)

    def shape(self) -> LaunchShape:
        if self.vcpus is None:
            return LaunchShape(firmware=self.firmware, hashes=self.hashes())
        return LaunchShape(
            firmware=self.firmware,
            hashes=self.hashes(),
            vcpus=self.vcpus,
            cpu=parse_cpu(self.cpu),
            flavour=self.flavour,
        )

    def blob(self) -> MeasurementBlob:
        return self.blob_of(self.shape().digest())

    def blob_of(self, digest: bytes) -> MeasurementBlob:
        made = measure(tik=self.tik, firmware=self.version, policy=self.policy, digest=digest, nonce=_NONCE)
        return MeasurementBlob(measurement=made, nonce=_NONCE)


_GUEST = _Guest()
_PLAIN = _Guest(vcpus=None, policy=_SEV_POLICY)


def _expected(guest: _Guest = _GUEST) -> Expected:
    named = "demo/2" if guest.kernel is not None else None
    return Expected(shape=guest.shape(), firmware="demo/2", kernel=named, initrd=named, cmdline=named)


def _explain(
    blob: MeasurementBlob,
    *expected: Expected,
    policy: GuestPolicy = _POLICY,
    catalogue: Catalogue = _CATALOGUE,
    digests: tuple[bytes, ...] = (),
    limit: int = 20_000,
) -> Explanation:
    return explain(
        blob=blob,
        keys=_KEYS,
        firmware=_VERSION,
        policy=policy,
        expected=expected if expected or digests else (_expected(),),
        catalogue=catalogue,
        digests=digests,
        limit=limit,
    )


_FOUND = [
    (_Guest(kernel="kernel demo/1"), "kernel 'demo/1' instead of 'demo/2'"),
    (_Guest(initrd="initrd demo/1"), "initrd 'demo/1' instead of 'demo/2'"),
    (_Guest(initrd=None), "initrd none instead of 'demo/2'"),
    (_Guest(cmdline=_CMDLINES["demo/1"]), "command line 'demo/1' instead of 'demo/2'"),
    (_Guest(cmdline=None), "command line none instead of 'demo/2'"),
    (
        _Guest(cmdline=_CMDLINES["demo/2"] + b"\n"),
        "command line 'demo/2' with a newline at its end instead of 'demo/2'",
    ),
    (_Guest(cmdline=_CMDLINES["demo/2"] + b"\0"), "command line 'demo/2' with two NULs at its end instead of 'demo/2'"),
    (_Guest(cmdline=_CMDLINES["demo/2"] + b" "), "command line 'demo/2' with a space at its end instead of 'demo/2'"),
    (_Guest(firmware=_firmware("demo/1")), "firmware 'demo/1' instead of 'demo/2'"),
    (_Guest(kernel=None), "kernel hashes off instead of on"),
    (_Guest(vcpus=9), "vCPU count 9 instead of 8"),
    (_Guest(vcpus=64), "vCPU count 64 instead of 8"),
    (_Guest(vcpus=1), "vCPU count 1 instead of 8"),
    (_Guest(cpu="EPYC-Milan"), "CPU type EPYC-Milan (25-1-1) instead of EPYC-Rome (23-49-0)"),
    (_Guest(flavour=Flavour.INIT2), "VMSA flavour init2 instead of legacy"),
    (_Guest(flavour=Flavour.LEGACY_DEBUG_SWAP), "VMSA flavour legacy+debug-swap instead of legacy"),
    (_Guest(flavour=Flavour.INIT2_AP_ZERO), "VMSA flavour init2-ap-zero instead of legacy"),
    (_Guest(tik=_KEYS.tek), "the session's TEK instead of the session's TIK"),
    (
        _Guest(tik=bytes(16)),
        "an all-zero TIK (the guest was started without the session) instead of the session's TIK",
    ),
    (
        _Guest(policy=GuestPolicy.parse(0x3701000E)),
        "guest policy 0x3701000e (NOKS ES NOSEND API>=1.55) instead of 0x3701000f (NODBG NOKS ES NOSEND API>=1.55)",
    ),
    (
        _Guest(policy=GuestPolicy.parse(0xF)),
        "guest policy 0x0000000f (NODBG NOKS ES NOSEND) instead of 0x3701000f (NODBG NOKS ES NOSEND API>=1.55)",
    ),
    (_Guest(version=FirmwareVersion(1, 55, 21)), "SEV firmware 1.55.21 instead of the reported 1.55.24"),
    (_Guest(version=FirmwareVersion(1, 55, 255)), "SEV firmware 1.55.255 instead of the reported 1.55.24"),
    (_Guest(version=FirmwareVersion(1, 49, 24)), "SEV firmware 1.49.24 instead of the reported 1.55.24"),
]


@pytest.mark.parametrize(("guest", "words"), _FOUND, ids=[words[:40] for _, words in _FOUND])
def test_a_single_difference_is_named(guest: _Guest, words: str) -> None:
    explanation = _explain(guest.blob())
    assert explanation.found
    assert explanation.sentence == f"the guest was measured with {words}"
    assert len(explanation.differences) == 1


_PAIRS = [
    (_Guest(kernel="kernel demo/1", vcpus=4), {"kernel", "vcpus"}),
    (_Guest(kernel="kernel demo/1", initrd="initrd demo/1"), {"kernel", "initrd"}),
    (_Guest(firmware=_firmware("demo/1"), kernel=None), {"firmware", "kernel_hashes"}),
    (_Guest(cpu="EPYC-Milan", flavour=Flavour.INIT2), {"cpu", "flavour"}),
    (_Guest(vcpus=64, cpu="EPYC-Genoa"), {"vcpus", "cpu"}),
    (_Guest(kernel="kernel demo/3", tik=bytes(16)), {"kernel", "key"}),
    (_Guest(cmdline=b"debug", flavour=Flavour.INIT2), {"cmdline", "flavour"}),
    (_Guest(policy=GuestPolicy.parse(0x3701000E), kernel="kernel demo/1"), {"policy", "kernel"}),
    (_Guest(version=FirmwareVersion(1, 55, 23), vcpus=2), {"firmware_version", "vcpus"}),
]


@pytest.mark.parametrize(("guest", "what"), _PAIRS)
def test_two_differences_are_named_together(guest: _Guest, what: set[str]) -> None:
    explanation = _explain(guest.blob())
    assert {difference.what for difference in explanation.differences} == what
    assert " and " in explanation.sentence


@pytest.mark.parametrize("bits", range(64))
@pytest.mark.parametrize("floor", [0, 0x37010000])
def test_a_launch_without_the_session_is_found_under_any_policy(bits: int, floor: int) -> None:
    policy = GuestPolicy.parse(floor | bits)
    guest = replace(_GUEST, policy=policy, tik=bytes(16))
    explanation = _explain(guest.blob() if policy.requires_es else replace(guest, vcpus=None).blob())
    what = [difference.what for difference in explanation.differences]
    assert what == (["key"] if policy == _POLICY else ["key", "policy"])
    assert "without the session" in explanation.sentence


def test_a_weaker_policy_and_another_kernel_without_the_session_are_three_differences() -> None:
    guest = _Guest(vcpus=None, policy=GuestPolicy.parse(1), tik=bytes(16), kernel="kernel demo/1")
    explanation = _explain(guest.blob())
    assert [difference.what for difference in explanation.differences] == ["key", "policy", "kernel"]
    assert explanation.sentence.count(",") == 1


def test_a_whole_older_version_is_found_although_everything_differs() -> None:
    guest = _Guest(
        firmware=_firmware("demo/1"),
        kernel="kernel demo/1",
        initrd="initrd demo/1",
        cmdline=_CMDLINES["demo/1"],
    )
    explanation = _explain(guest.blob())
    assert [difference.what for difference in explanation.differences] == ["firmware", "kernel", "initrd", "cmdline"]
    assert all(difference.found == "'demo/1'" for difference in explanation.differences)


def test_a_whole_older_version_that_had_fewer_parts_is_found() -> None:
    old = _firmware("demo/0")
    bare = replace(_CATALOGUE, firmwares={**_CATALOGUE.firmwares, "demo/0": old})
    explanation = _explain(_Guest(firmware=old, kernel=None).blob(), catalogue=bare)
    assert [difference.what for difference in explanation.differences] == ["firmware", "kernel_hashes"]
    with_kernel = replace(bare, kernels={**_CATALOGUE.kernels, "demo/0": _sha("kernel demo/0")})
    guest = _Guest(firmware=old, kernel="kernel demo/0", initrd=None, cmdline=None)
    explanation = _explain(guest.blob(), catalogue=with_kernel)
    assert [difference.what for difference in explanation.differences] == ["firmware", "kernel", "initrd", "cmdline"]


def test_the_nearest_of_several_expected_shapes_is_compared_with() -> None:
    expected = [_expected(replace(_GUEST, vcpus=vcpus)) for vcpus in (1, 2, 4, 8)]
    explanation = _explain(replace(_GUEST, vcpus=4, kernel="kernel demo/1").blob(), *expected)
    assert explanation.sentence == "the guest was measured with kernel 'demo/1' instead of 'demo/2'"


def test_for_plain_sev_kernel_and_policy_differences_are_found() -> None:
    expected = _expected(_PLAIN)
    found = _explain(replace(_PLAIN, kernel="kernel demo/1").blob(), expected, policy=_SEV_POLICY)
    assert found.sentence == "the guest was measured with kernel 'demo/1' instead of 'demo/2'"
    found = _explain(replace(_PLAIN, policy=GuestPolicy.parse(1), tik=bytes(16)).blob(), expected, policy=_SEV_POLICY)
    assert [difference.what for difference in found.differences] == ["key", "policy"]


def test_hashes_of_known_artefacts_where_none_were_expected_are_found() -> None:
    expected = Expected(shape=replace(_GUEST, kernel=None).shape(), firmware="demo/2")
    explanation = _explain(_Guest(kernel="kernel demo/1").blob(), expected)
    assert explanation.sentence == "the guest was measured with kernel hashes on instead of off"


@pytest.mark.parametrize(
    "guest",
    [
        _Guest(kernel="a kernel that nobody has on file"),
        _Guest(initrd="an initrd that nobody has on file"),
        _Guest(cmdline=b"init=/bin/sh"),
        _Guest(firmware=_firmware("unknown")),
        _Guest(tik=b"\x03" * 16),
    ],
)
def test_an_unknown_change_is_not_guessed(guest: _Guest) -> None:
    explanation = _explain(guest.blob())
    assert not explanation.found
    assert explanation.differences == ()
    assert explanation.complete
    assert (
        explanation.sentence
        == "the measurement matches nothing on file: firmware, kernel, initrd or command line differ"
    )


def test_what_is_not_on_file_is_found_once_it_is() -> None:
    guest = _Guest(kernel="kernel demo/0")
    assert not _explain(guest.blob()).found
    wider = replace(_CATALOGUE, kernels={**_CATALOGUE.kernels, "demo/0": _sha("kernel demo/0")})
    assert _explain(guest.blob(), catalogue=wider).sentence.endswith("kernel 'demo/0' instead of 'demo/2'")


def test_a_search_that_reaches_its_limit_says_so() -> None:
    explanation = _explain(_Guest(kernel="unknown").blob(), limit=50)
    assert not explanation.found
    assert not explanation.complete
    assert explanation.tried <= 50
    assert f"(search ended after {explanation.tried} neighbours)" in explanation.sentence


def test_the_limit_counts_the_hashing_of_register_pages_too() -> None:
    explanation = _explain(replace(_GUEST, vcpus=64, kernel="unknown").blob(), limit=200)
    assert explanation.tried < 200


@pytest.mark.parametrize(
    ("guest", "what"),
    [
        (_Guest(kernel="kernel demo/1", vcpus=40), ["kernel"]),
        (_Guest(kernel=None, vcpus=3, flavour=Flavour.INIT2), ["kernel_hashes"]),
        (_Guest(vcpus=None, policy=GuestPolicy.parse(1), tik=bytes(16)), ["key", "policy"]),
        (
            _Guest(vcpus=None, policy=GuestPolicy.parse(1), tik=bytes(16), kernel="kernel demo/1"),
            ["key", "policy", "kernel"],
        ),
        (_Guest(vcpus=64, cpu="EPYC-Milan", policy=GuestPolicy.parse(5), tik=bytes(16)), ["key", "policy"]),
    ],
)
def test_as_many_shapes_as_a_workload_may_have_do_not_hide_what_is_likely(guest: _Guest, what: list[str]) -> None:
    many = [
        _expected(replace(_GUEST, vcpus=vcpus, cpu=cpu, flavour=flavour))
        for vcpus in range(1, 65)
        for cpu in ("EPYC-Rome", "EPYC-Milan")
        for flavour in (Flavour.LEGACY, Flavour.LEGACY_DEBUG_SWAP, Flavour.INIT2, Flavour.INIT2_DEBUG_SWAP)
    ]
    assert len(many) == 512
    explanation = _explain(guest.blob(), *many)
    assert [difference.what for difference in explanation.differences] == what


def test_a_measurement_that_was_expected_is_called_so() -> None:
    explanation = _explain(_GUEST.blob())
    assert (explanation.found, explanation.differences) == (True, ())
    assert explanation.sentence == "the measurement is one that was expected"


def test_a_bare_digest_has_neighbours_in_key_policy_and_version() -> None:
    digest = _sha("a digest that the owner listed")
    for guest, what in (
        (_Guest(tik=bytes(16)), ["key"]),
        (_Guest(policy=GuestPolicy.parse(0x5), tik=bytes(16)), ["key", "policy"]),
        (_Guest(version=FirmwareVersion(1, 55, 25)), ["firmware_version"]),
    ):
        explanation = _explain(guest.blob_of(digest), digests=(digest,))
        assert [difference.what for difference in explanation.differences] == what
    assert not _explain(_GUEST.blob_of(_sha("another")), digests=(digest,)).found


def test_nothing_expected_and_nothing_on_file_is_explained_by_nothing() -> None:
    empty = Catalogue(firmwares={}, kernels={}, initrds={}, cmdlines={})
    explanation = explain(
        blob=_GUEST.blob(), keys=_KEYS, firmware=_VERSION, policy=_POLICY, expected=(), catalogue=empty
    )
    assert not explanation.found
    assert explanation.tried == 0


def test_a_firmware_on_file_that_cannot_take_hashes_is_passed_over() -> None:
    poor = measure_firmware([with_footer(b"poor", [])])
    catalogue = replace(_CATALOGUE, firmwares={"poor": poor, **_CATALOGUE.firmwares})
    assert _explain(_Guest(kernel="kernel demo/1").blob(), catalogue=catalogue).found
    blob = _Guest(firmware=poor, kernel=None, vcpus=1).blob()
    expected = _expected(replace(_GUEST, vcpus=1))
    what = [difference.what for difference in _explain(blob, expected, catalogue=catalogue).differences]
    assert what == ["firmware", "kernel_hashes"]


def test_no_key_shows_in_an_explanation() -> None:
    shown = repr(_explain(_Guest(tik=bytes(16)).blob()))
    assert _KEYS.tik.hex() not in shown
    assert repr(_KEYS.tik) not in shown
