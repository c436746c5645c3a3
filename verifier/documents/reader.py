"""From a document's text to a `Workload`, or to everything that is wrong with it.

`parse_workload` turns a text into a value that needs no further check of form, or refuses it with every problem that it
has. Nothing is read from disk here: paths are resolved against the document's folder and left to `verifier.library`.
What is absent is refused where absence would allow more: no callers, no platforms, no digests.
"""

from __future__ import annotations

import hashlib
import re
from datetime import timedelta
from pathlib import Path, PurePath
from types import MappingProxyType

from common.errors import SevattestError
from common.ids import canonical_uuid
from common.rpc.identity import Role, parse_spiffe_id
from common.sev.abi import MINIMUM_API, PolicyBit
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion
from common.sev.secret import ENTRIES_MAX
from verifier.documents.form import SecretForm, SpecForm, WorkloadForm, read_form
from verifier.documents.generations import GENERATIONS, PLAIN_SEV_RISK
from verifier.documents.measure import HEX32, MeasureReader, Problems
from verifier.documents.text import InvalidDocument, parse_text
from verifier.documents.workload import (
    ATTESTED_GUID,
    SECRET_AREA_DEFAULT,
    SecretSpec,
    Workload,
)

CALLERS_MAX = 1024
CHIPS_MAX = 65536
LIFETIME_MIN = timedelta(seconds=10)
LIFETIME_MAX = timedelta(hours=24)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_API = re.compile(r"(\d{1,3})\.(\d{1,3})", re.ASCII)
_LIFETIME = re.compile(r"(\d{1,5})(s|m|h)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_ALLOW = {
    "debug": PolicyBit.NODBG,
    "key-sharing": PolicyBit.NOKS,
    "no-es": PolicyBit.ES,
    "send": PolicyBit.NOSEND,
}
_ALLOW_RISKS = {
    "debug": "the policy allows debugging: the host can read the guest's memory",
    "key-sharing": "the policy allows key sharing: another guest of the host may share this one's key",
    "no-es": PLAIN_SEV_RISK,
    "send": "the policy allows migration: one leaked chip key of the generation is enough to take the guest over",
}
_DEFAULT_BITS = PolicyBit.NODBG | PolicyBit.NOKS | PolicyBit.ES | PolicyBit.NOSEND


def parse_workload(text: bytes, *, is_json: bool, folder: PurePath, source: str) -> Workload:
    """The workload that a document's text spells.

    Args:
        text: the document.
        is_json: whether it is JSON; else YAML.
        folder: what relative paths are relative to.
        source: the document's name in messages.

    Raises:
        InvalidDocument: with every problem that was found.
    """
    form = read_form(parse_text(text, is_json=is_json))
    reader = _Reader(form, Path(folder))
    workload = reader.workload(sha256=hashlib.sha256(text).hexdigest(), source=source)
    if reader.problems or workload is None:
        raise InvalidDocument(*reader.problems)
    return workload


class _Reader:
    """Reads one form, collecting problems instead of stopping at the first."""

    def __init__(self, form: WorkloadForm, folder: Path) -> None:
        self._form = form
        self._spec: SpecForm = form.spec
        self._folder = folder
        self._problems = Problems()
        self.warnings: list[str] = []

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, so far."""
        return tuple(self._problems.found)

    def workload(self, *, sha256: str, source: str) -> Workload | None:
        """The value; None where a problem leaves nothing to build it from."""
        meta, spec = self._form.metadata, self._spec
        if not _NAME.fullmatch(meta.name):
            self._problems.add("metadata.name", "must be 1 to 128 of A-Z a-z 0-9 . _ -, not starting with . or -")
        if not _VERSION.fullmatch(meta.version):
            self._problems.add(
                "metadata.version", "must be 1 to 64 of A-Z a-z 0-9 . _ + -, starting with a letter or digit"
            )
        bits = self._bits()
        measure = MeasureReader(spec, self._folder, self._problems)
        artefacts, digests = measure.artefacts(es=PolicyBit.ES in bits), measure.digests()
        generations = self._generations()
        floors, lowered = self._floors(generations)
        minimum_api = self._minimum_api()
        callers, chips = self._callers(), self._chips()
        secrets, lifetime = self._secrets(), self._lifetime()
        risks = self._risks(lowered=lowered, no_api=minimum_api is None)
        if self._problems.found:
            return None
        return Workload(
            name=meta.name,
            version=meta.version,
            sha256=sha256,
            source=source,
            callers=callers,
            artefacts=artefacts,
            digests=digests,
            secret_area=None if artefacts else (spec.secret_area or SECRET_AREA_DEFAULT),
            bits=bits,
            minimum_api=minimum_api,
            generations=generations,
            chips=chips,
            floors=MappingProxyType(floors),
            accept_old_firmware=spec.accept_old_firmware,
            secrets=secrets,
            lifetime=lifetime,
            risks=risks,
            warnings=tuple(self.warnings),
        )

    def _bits(self) -> PolicyBit:
        bits = _DEFAULT_BITS
        for name in self._spec.policy.allow:
            if _ALLOW[name] not in bits:
                self._problems.add("spec.policy.allow", f"{name} comes twice")
            bits &= ~_ALLOW[name]
        return bits | PolicyBit.DOMAIN if self._spec.policy.domain else bits

    def _minimum_api(self) -> tuple[int, int] | None:
        text, path = self._spec.policy.minimum_api, "spec.policy.minimum_api"
        if text is None:
            return MINIMUM_API
        if text == "none":
            if self._spec.accept_old_firmware is None:
                self._problems.add(path, "none needs accept_old_firmware with a reason")
            return None
        match = _API.fullmatch(text)
        if match is None or any(int(number) > 255 for number in match.groups()):
            self._problems.add(path, 'must be major.minor, each 0 to 255, as in "1.55", or none')
            return MINIMUM_API
        api = (int(match[1]), int(match[2]))
        if api < MINIMUM_API:
            self._problems.add(path, "must be at least 0.17: before it measurements cover no version")
        return api

    def _callers(self) -> frozenset[str]:
        path = "spec.callers"
        if not self._spec.callers:
            self._problems.add(path, "names nobody: list the orchestrators that may launch this workload")
        if len(self._spec.callers) > CALLERS_MAX:
            self._problems.add(path, f"names more than {CALLERS_MAX} callers")
        for index, text in enumerate(self._spec.callers):
            try:
                if parse_spiffe_id(text).role is not Role.ORCHESTRATOR:
                    self._problems.add(f"{path}[{index}]", "is not an orchestrator")
            except SevattestError:
                self._problems.add(f"{path}[{index}]", "must be spiffe://TRUST-DOMAIN/orchestrator/NAME")
        self._problems.refuse_repeats(path, self._spec.callers)
        return frozenset(self._spec.callers)

    def _chips(self) -> frozenset[str] | None:
        chips, path = self._spec.platforms.chips, "spec.platforms.chips"
        if chips == "any":
            return None
        if not chips:
            self._problems.add(path, "names no chip: list fingerprints, or write any")
        if len(chips) > CHIPS_MAX:
            self._problems.add(path, f"names more than {CHIPS_MAX} chips")
        for index, text in enumerate(chips):
            if not HEX32.fullmatch(text):
                self._problems.add(f"{path}[{index}]", "must be a CEK's fingerprint: 64 lower-case hex digits")
        self._problems.refuse_repeats(path, chips)
        return frozenset(chips)

    def _generations(self) -> frozenset[str]:
        names, path = self._spec.platforms.generations, "spec.platforms.generations"
        if not names:
            self._problems.add(path, f"names no generation: list some of {', '.join(GENERATIONS)}")
        for index, name in enumerate(names):
            if name not in GENERATIONS:
                self._problems.add(f"{path}[{index}]", f"must be one of {', '.join(GENERATIONS)}")
            elif caution := GENERATIONS[name].caution:
                self.warnings.append(f"{path}: {name}: {caution}")
        self._problems.refuse_repeats(path, names)
        return frozenset(names) & GENERATIONS.keys()

    def _floors(self, generations: frozenset[str]) -> tuple[dict[str, FirmwareVersion], tuple[str, ...]]:
        """The floor for each allowed generation, and the names of those below the table's."""
        floors: dict[str, FirmwareVersion] = {}
        lowered = []
        for name in sorted(generations):
            floor = GENERATIONS[name].floor
            if floor is not None:
                floors[name] = floor
        for name, text in self._spec.floors.items():
            path = f"spec.floors.{name}"
            if name not in generations:
                self._problems.add(path, "is a floor for a generation that platforms.generations does not list")
                continue
            try:
                floor = FirmwareVersion.parse(text)
            except ParseError as error:
                self._problems.add(path, error.message)
                continue
            if floor[:2] < MINIMUM_API:
                self._problems.add(path, "must be at least 0.17.0: before it measurements cover no version")
            known = floors.get(name)
            if known is not None and floor < known:
                lowered.append(name)
                if self._spec.accept_old_firmware is None:
                    self._problems.add(
                        path, f"is below {known}, the oldest known good: accept_old_firmware with a reason"
                    )
            floors[name] = floor
        for name in sorted(generations - floors.keys()):
            self._problems.add(f"spec.floors.{name}", f"is needed: {GENERATIONS[name].caution}")
        return floors, tuple(lowered)

    def _risks(self, *, lowered: tuple[str, ...], no_api: bool) -> tuple[str, ...]:
        reason = self._spec.accept_old_firmware
        risks = [_ALLOW_RISKS[name] for name in self._spec.policy.allow]
        if reason is not None and not reason.strip():
            self._problems.add("spec.accept_old_firmware", "is a reason, in words")
        if lowered:
            risks.append(f"firmware below the oldest known good is accepted on {', '.join(lowered)}: {reason}")
        if no_api:
            risks.append(f"the policy names no API version, so the platform itself refuses no old firmware: {reason}")
        if reason is not None and not lowered and not no_api:
            self.warnings.append("spec.accept_old_firmware: changes nothing, no floor is below the table's")
        if self._spec.platforms.chips == "any":
            risks.append("any chip of the allowed generations is accepted")
        self.warnings += [f"spec.policy.allow: {_ALLOW_RISKS[name]}" for name in self._spec.policy.allow]
        return tuple(risks)

    def _secrets(self) -> tuple[SecretSpec, ...]:
        items, path = self._spec.secrets, "spec.secrets"
        if not items:
            return (SecretSpec(guid=ATTESTED_GUID, file=None),)
        if len(items) > ENTRIES_MAX:
            self._problems.add(path, f"lists {len(items)} secrets, Linux reads at most {ENTRIES_MAX}")
        secrets = [spec for index, item in enumerate(items) if (spec := self._secret(f"{path}[{index}]", item))]
        self._problems.refuse_repeats(path, [str(secret.guid) for secret in secrets])
        return tuple(secrets)

    def _secret(self, path: str, item: SecretForm) -> SecretSpec | None:
        guid = canonical_uuid(item.guid)
        if guid is None or guid.int == 0:
            self._problems.add(f"{path}.guid", "must be a GUID in canonical form (36 characters, lower case), not zero")
            return None
        file = self._problems.file(f"{path}.source.file", self._folder, item.source.file)
        return SecretSpec(guid=guid, file=file, trailing_nul=item.trailing_nul)

    def _lifetime(self) -> timedelta:
        match = _LIFETIME.fullmatch(self._spec.lifetime)
        lifetime = timedelta(seconds=int(match[1]) * _SECONDS[match[2]]) if match else timedelta()
        if not LIFETIME_MIN <= lifetime <= LIFETIME_MAX:
            self._problems.add("spec.lifetime", "must be 10s to 24h, as in 90s, 10m or 1h")
        return lifetime
