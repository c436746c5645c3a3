"""From the form of a Workload to a `Workload`, or to everything that is wrong with it.

Nothing is read from disk here: paths are resolved against the document's folder and left to `verifier.library`. What is
absent is refused where absence would allow more: no platforms, no digests.
"""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

from common.sev.abi import MINIMUM_API, PolicyBit
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion
from verifier.documents.form_workload import SpecForm, WorkloadForm
from verifier.documents.generations import GENERATIONS, PLAIN_SEV_RISK
from verifier.documents.measure import MeasureReader
from verifier.documents.problems import HEX32, Problems, duration
from verifier.documents.reader_secrets import read_secrets
from verifier.documents.text import InvalidDocument
from verifier.documents.workload import SECRET_AREA_DEFAULT, Ownership, Workload

LIFETIME_MIN = timedelta(seconds=10)
LIFETIME_MAX = timedelta(hours=24)

_API = re.compile(r"(\d{1,3})\.(\d{1,3})", re.ASCII)
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


def read_workload(form: WorkloadForm, *, folder: Path, sha256: str, source: str, confined: bool = False) -> Workload:
    """The workload that a form describes.

    Args:
        form: the filled-in form.
        folder: what relative paths are relative to.
        sha256: of the document's text, lower-case hex.
        source: the document's name in messages.
        confined: whether it may name files in the folder only.

    Raises:
        InvalidDocument: with every problem that was found.
    """
    reader = _Reader(form, folder, Problems(confined=confined))
    workload = reader.workload(sha256=sha256, source=source)
    if reader.problems or workload is None:
        raise InvalidDocument(*reader.problems)
    return workload


class _Reader:
    """Reads one form, collecting problems instead of stopping at the first."""

    def __init__(self, form: WorkloadForm, folder: Path, problems: Problems) -> None:
        self._form = form
        self._spec: SpecForm = form.spec
        self._folder = folder
        self._problems = problems
        self.warnings: list[str] = []

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, so far."""
        return tuple(self._problems.found)

    def workload(self, *, sha256: str, source: str) -> Workload | None:
        """The value; None where a problem leaves nothing to build it from."""
        meta, spec = self._form.metadata, self._spec
        self._problems.metadata(meta)
        bits = self._bits()
        measure = MeasureReader(spec, self._folder, self._problems)
        artefacts, digests = measure.artefacts(es=PolicyBit.ES in bits), measure.digests()
        generations = self._generations()
        floors, lowered = self._floors(generations)
        minimum_api = self._minimum_api()
        callers, chips, ownership = self._callers(), self._chips(), self._ownership()
        secrets = read_secrets(spec.secrets, self._folder, self._problems)
        lifetime = self._lifetime()
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
            ownership=ownership,
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
        return self._problems.callers("spec.callers", self._spec.callers)

    def _chips(self) -> frozenset[str] | None:
        chips, path = self._spec.platforms.chips, "spec.platforms.chips"
        if chips == "any":
            return None
        if not chips:
            self._problems.add(path, "names no chip: list fingerprints, or write any")
        return self._problems.digits(path, chips, HEX32, "must be a CEK's fingerprint: 64 lower-case hex digits")

    def _ownership(self) -> Ownership:
        form, path = self._spec.platforms.ownership, "spec.platforms.ownership"
        if form == "self" and self._spec.platforms.chips == "any":
            self._problems.add(path, "self needs a list of chips: whoever holds a chip's keys can make what looks so")
        if form == "any" or form == "self":  # noqa: PLR1714 -- mypy narrows by these
            return form
        if not form:
            self._problems.add(path, "names no owner: list fingerprints of OCAs, or write any or self")
        return self._problems.digits(path, form, HEX32, "must be an OCA's fingerprint: 64 lower-case hex digits")

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
        if reason is not None:
            self._problems.reason("spec.accept_old_firmware", reason)
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

    def _lifetime(self) -> timedelta:
        lifetime = duration(self._spec.lifetime)
        if lifetime is None or not LIFETIME_MIN <= lifetime <= LIFETIME_MAX:
            self._problems.add("spec.lifetime", "must be 10s to 24h, as in 90s, 10m or 1h")
            return LIFETIME_MIN
        return lifetime
