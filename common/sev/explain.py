"""Why a measurement does not match: the known neighbour of an expected launch that it does match, or none.

For the owner's eyes only: the host learns a reason code. The search knows what the owner has on file and a fixed list
of slips (common.sev.neighbours), never what anybody did. One HMAC over one hash cannot say which of several unknown
parts differs, so an unknown change is reported as exactly that. Nothing here decides: a launch that is explained stays
refused.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.sev.abi import KEY_SIZE, MAC_MEASURE
from common.sev.digest.compute import LaunchShape, MeasuredFirmware
from common.sev.digest.kernel_hashes import NO_INITRD, hash_cmdline
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.neighbours import DigestCache, Key, Launch, Material, cmdline_slips, known_cpus, neighbours
from common.sev.policy import GuestPolicy
from common.sev.session import LaunchKeys

LIMIT = 20_000
# Hashing so many register pages takes as long as trying one candidate, or less.
_PAGES_A_CANDIDATE = 4
# The same launch can be reached on several ways; reaching it again is cheap, but not free.
_VISITS_A_CANDIDATE = 10

_NOTHING = "the measurement matches nothing on file: firmware, kernel, initrd or command line differ"
_NONE = "none"
# How a difference is named in a sentence; the keys are stable identifiers.
_NOUNS = {
    "key": "",
    "policy": "guest policy ",
    "firmware": "firmware ",
    "kernel_hashes": "kernel hashes ",
    "kernel": "kernel ",
    "initrd": "initrd ",
    "cmdline": "command line ",
    "vcpus": "vCPU count ",
    "cpu": "CPU type ",
    "flavour": "VMSA flavour ",
    "firmware_version": "SEV firmware ",
    "digest": "launch digest ",
}
_KEYS = {
    Key.TIK: "the session's TIK",
    Key.TEK: "the session's TEK",
    Key.ZERO: "an all-zero TIK (the guest was started without the session)",
}


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What the owner has on file, by label.

    Attributes:
        firmwares: measured images.
        kernels: SHA-256 of kernels.
        initrds: SHA-256 of initrds.
        cmdlines: command lines as they are, without NUL.
    """

    firmwares: Mapping[str, MeasuredFirmware]
    kernels: Mapping[str, bytes]
    initrds: Mapping[str, bytes]
    cmdlines: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One shape that would have been accepted, with the labels of its parts.

    Attributes:
        shape: the shape.
        firmware: label of its firmware.
        kernel: label of its kernel, None where none is measured.
        initrd: label of its initrd, None where there is none.
        cmdline: label of its command line, None where there is none.
    """

    shape: LaunchShape
    firmware: str
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not as expected.

    Attributes:
        what: `key`, `policy`, `firmware`, `kernel_hashes`, `kernel`, `initrd`, `cmdline`, `vcpus`, `cpu`, `flavour`,
            `firmware_version` or `digest`.
        expected: what the owner expects, or for `firmware_version` the host reports, for people.
        found: what was measured, for people.
    """

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        # Of the version alone the owner expects nothing: it is the host that says it.
        instead = "instead of the reported" if self.what == "firmware_version" else "instead of"
        return f"{_NOUNS[self.what]}{self.found} {instead} {self.expected}"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the search came to.

    Attributes:
        found: whether a neighbour has this measurement.
        differences: in what it differs from the nearest expected launch; empty where nothing was found, or where
            nothing differs.
        sentence: the same for the owner's log.
        tried: candidates tried.
        complete: whether every neighbour was tried, False where the limit or a match ended the search.
    """

    found: bool
    differences: tuple[Difference, ...]
    sentence: str
    tried: int
    complete: bool


def explain(
    *,
    blob: MeasurementBlob,
    keys: LaunchKeys,
    firmware: FirmwareVersion,
    policy: GuestPolicy,
    expected: Sequence[Expected],
    catalogue: Catalogue,
    digests: Sequence[bytes] = (),
    limit: int = LIMIT,
) -> Explanation:
    """Search the neighbours of the expected launches for one that has this measurement.

    Args:
        blob: what the host handed in.
        keys: the launch's transport keys.
        firmware: the version that the host reports.
        policy: the policy that the session was made for.
        expected: the shapes that would have been accepted.
        catalogue: everything that the owner has on file, the expected versions included.
        digests: launch digests that would have been accepted and of which nothing more is known.
        limit: how many candidates to try at most; hashing four register pages counts as one more.

    Returns:
        The match with the fewest differences, by the order of `neighbours`.
    """
    names = _Names(expected, catalogue)
    material = _material(expected, catalogue)
    bases = [_base(each.shape, policy, firmware) for each in expected]
    bases += [_bare(digest, policy, firmware) for digest in digests]
    search = _Search(blob=blob, keys=keys, cache=DigestCache(material), limit=limit)
    # The expected launches themselves come first: a caller who asks although all is well gets an honest answer.
    match = search.run(bases) or search.run(neighbours(bases, material))
    if match is None:
        sentence = _NOTHING if not search.exhausted else f"{_NOTHING} (search ended after {search.tried} neighbours)"
        return Explanation(
            found=False, differences=(), sentence=sentence, tried=search.tried, complete=not search.exhausted
        )
    alike = (base for base in bases if (base.digest is None) == (match.digest is None))
    differences = min((names.differences(base, match) for base in alike), key=len)
    sentence = (
        f"the guest was measured with {_and(str(difference) for difference in differences)}"
        if differences
        else "the measurement is one that was expected"
    )
    return Explanation(found=True, differences=differences, sentence=sentence, tried=search.tried, complete=False)


class _Search:
    """Tries candidates until one matches or the limit is reached."""

    def __init__(self, *, blob: MeasurementBlob, keys: LaunchKeys, cache: DigestCache, limit: int) -> None:
        self.tried = 0
        self.exhausted = False
        self._blob = blob
        self._keys = {Key.TIK: keys.tik, Key.TEK: keys.tek, Key.ZERO: bytes(KEY_SIZE)}
        self._cache = cache
        self._limit = limit
        self._visits = 0
        self._seen: set[Launch] = set()

    def run(self, candidates: Iterable[Launch]) -> Launch | None:
        for launch in candidates:
            self._visits += 1
            if (
                self.tried + self._cache.pages // _PAGES_A_CANDIDATE >= self._limit
                or self._visits > self._limit * _VISITS_A_CANDIDATE
            ):
                self.exhausted = True
                return None
            if launch in self._seen:
                continue
            self._seen.add(launch)
            digest = self._cache.digest(launch)
            if digest is None:
                continue
            self.tried += 1
            covered = (
                bytes((MAC_MEASURE, *launch.version)) + launch.policy.to_bytes(4, "little") + digest + self._blob.nonce
            )
            measurement = hmac.digest(self._keys[launch.key], covered, "sha256")
            if hmac.compare_digest(measurement, self._blob.measurement):
                return launch
        return None


class _Names:
    """Words for the parts of launches: the owner's labels."""

    def __init__(self, expected: Sequence[Expected], catalogue: Catalogue) -> None:
        self._cpus = known_cpus(each.shape.cpu for each in expected if each.shape.cpu is not None)
        self._labels: dict[tuple[str, bytes], str] = {
            ("initrd", NO_INITRD): _NONE,
            ("cmdline", hash_cmdline(None)): _NONE,
        }
        # What is expected keeps the label that the workload gives it, even where an older version has the same bytes.
        for each in expected:
            self._label("firmware", each.shape.firmware.sha256, each.firmware)
            if each.shape.hashes is not None:
                self._label("kernel", each.shape.hashes.kernel, each.kernel)
                self._label("initrd", each.shape.hashes.initrd, each.initrd)
                self._label("cmdline", each.shape.hashes.cmdline, each.cmdline)
        for label, image in catalogue.firmwares.items():
            self._label("firmware", image.sha256, label)
        for label, digest in catalogue.kernels.items():
            self._label("kernel", digest, label)
        for label, digest in catalogue.initrds.items():
            self._label("initrd", digest, label)
        for label, cmdline in catalogue.cmdlines.items():
            self._label("cmdline", hash_cmdline(cmdline), label)
        for label, cmdline in catalogue.cmdlines.items():
            for digest, what in cmdline_slips(cmdline):
                self._labels.setdefault(("cmdline", digest), f"'{label}' {what}")

    def _label(self, what: str, digest: bytes, label: str | None) -> None:
        if label is not None:
            self._labels.setdefault((what, digest), f"'{label}'")

    def differences(self, expected: Launch, found: Launch) -> tuple[Difference, ...]:
        """In what two launches differ. What follows from another difference is not listed again."""
        pairs: list[tuple[str, str, str]] = [
            ("key", _KEYS[expected.key], _KEYS[found.key]),
            ("policy", str(GuestPolicy.parse(expected.policy)), str(GuestPolicy.parse(found.policy))),
            ("firmware_version", str(expected.version), str(found.version)),
            ("digest", _hex(expected.digest), _hex(found.digest)),
            ("firmware", self._name("firmware", expected.firmware), self._name("firmware", found.firmware)),
        ]
        if expected.has_hashes != found.has_hashes:
            pairs.append(("kernel_hashes", _switch(on=expected.has_hashes), _switch(on=found.has_hashes)))
        else:
            pairs += [
                ("kernel", self._name("kernel", expected.kernel), self._name("kernel", found.kernel)),
                ("initrd", self._name("initrd", expected.initrd), self._name("initrd", found.initrd)),
                ("cmdline", self._name("cmdline", expected.cmdline), self._name("cmdline", found.cmdline)),
            ]
        if expected.is_es and found.is_es:
            pairs += [
                ("vcpus", str(expected.vcpus), str(found.vcpus)),
                ("cpu", self._cpu(expected.cpu), self._cpu(found.cpu)),
                ("flavour", str(expected.flavour), str(found.flavour)),
            ]
        return tuple(Difference(what=what, expected=one, found=other) for what, one, other in pairs if one != other)

    def _name(self, what: str, digest: bytes | None) -> str:
        return _NONE if not digest else self._labels.get((what, digest), _hex(digest))

    def _cpu(self, signature: int | None) -> str:
        return _NONE if signature is None else str(self._cpus[signature])


def _material(expected: Sequence[Expected], catalogue: Catalogue) -> Material:
    labels = dict.fromkeys((*catalogue.firmwares, *catalogue.kernels, *catalogue.initrds, *catalogue.cmdlines))
    versions = []
    for label in labels:
        image, cmdline = catalogue.firmwares.get(label), catalogue.cmdlines.get(label)
        versions.append(
            (
                None if image is None else image.sha256,
                catalogue.kernels.get(label),
                catalogue.initrds.get(label),
                None if cmdline is None else hash_cmdline(cmdline),
            )
        )
    images = (*catalogue.firmwares.values(), *(each.shape.firmware for each in expected))
    return Material(
        firmwares={image.sha256: image for image in images},
        kernels=tuple(dict.fromkeys(catalogue.kernels.values())),
        initrds=tuple(dict.fromkeys(catalogue.initrds.values())),
        cmdlines={hash_cmdline(cmdline): cmdline for cmdline in catalogue.cmdlines.values()},
        versions=versions,
        cpus=known_cpus(each.shape.cpu for each in expected if each.shape.cpu is not None),
    )


def _base(shape: LaunchShape, policy: GuestPolicy, version: FirmwareVersion) -> Launch:
    hashes, cpu = shape.hashes, shape.cpu
    return Launch(
        digest=None,
        firmware=shape.firmware.sha256,
        kernel=None if hashes is None else hashes.kernel,
        initrd=None if hashes is None else hashes.initrd,
        cmdline=None if hashes is None else hashes.cmdline,
        vcpus=shape.vcpus,
        cpu=None if cpu is None else cpu.signature,
        flavour=shape.flavour,
        policy=policy.value,
        version=version,
        key=Key.TIK,
    )


def _bare(digest: bytes, policy: GuestPolicy, version: FirmwareVersion) -> Launch:
    return Launch(
        digest=digest,
        firmware=b"",
        kernel=None,
        initrd=None,
        cmdline=None,
        vcpus=None,
        cpu=None,
        flavour=None,
        policy=policy.value,
        version=version,
        key=Key.TIK,
    )


def _hex(digest: bytes | None) -> str:
    return _NONE if digest is None else digest.hex()


def _switch(*, on: bool) -> str:
    return "on" if on else "off"


def _and(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
