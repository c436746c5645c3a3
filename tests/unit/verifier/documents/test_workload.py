"""Workload documents: what each key means, what is refused with which path, and what absence means."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import pytest
import yaml

from common.sev.abi import PolicyBit
from common.sev.digest.vmsa import Flavour
from common.sev.measurement import FirmwareVersion
from common.versions import version_order
from tests.support.documents import CHIP, SECRET_GUID
from tests.support.documents import read as read_any
from tests.support.documents import workload as document
from verifier.documents.generations import GENERATIONS
from verifier.documents.reader import read_document
from verifier.documents.sources import FileSource, GeneratedSource, Source, StoredSource, VaultSource
from verifier.documents.text import InvalidDocument
from verifier.documents.workload import (
    ATTESTED_GUID,
    ATTESTED_SIZE,
    SECRET_AREA_DEFAULT,
    Workload,
    among,
)

ANY = {"generations": ["milan"], "chips": "any"}


def read(content: dict[str, Any]) -> Workload:
    workload = read_any(content)
    assert isinstance(workload, Workload)
    return workload


def problems(content: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(InvalidDocument) as caught:
        read(content)
    return caught.value.problems


def secret() -> dict[str, Any]:
    return {"guid": str(SECRET_GUID), "source": {"file": "secret"}}


def measured(**changes: Any) -> dict[str, Any]:
    measure = {**document()["spec"]["measure"], **changes}
    return {name: value for name, value in measure.items() if value is not None}


def test_a_good_document_is_read_with_safe_defaults() -> None:
    workload = read(document())
    assert (workload.name, workload.version) == ("web", "1")
    assert workload.bits == PolicyBit.NODBG | PolicyBit.NOKS | PolicyBit.ES | PolicyBit.NOSEND
    assert workload.minimum_api == (0, 17)
    assert workload.lifetime == timedelta(minutes=10)
    assert workload.chips is None
    assert workload.artefacts is not None
    assert workload.artefacts.firmware == Path("/owner/ovmf.fd")
    assert workload.artefacts.cmdline == b"console=ttyS0"
    assert workload.secrets[0].guid == SECRET_GUID
    assert workload.floors == {"emulated": FirmwareVersion(0, 17, 0)}


def test_json_says_the_same_as_yaml() -> None:
    text = json.dumps(document()).encode()
    workload = read_document(text, is_json=True, folder=PurePath("/owner"), source="web.json")
    assert isinstance(workload, Workload)
    assert workload.artefacts == read(document()).artefacts


def test_the_documents_digest_is_that_of_its_text() -> None:
    import hashlib

    text = yaml.safe_dump(document()).encode()
    assert read(document()).sha256 == hashlib.sha256(text).hexdigest()


def test_without_listed_secrets_a_guest_gets_an_attested_entry() -> None:
    (secret,) = read(document(secrets=None)).secrets
    assert (secret.guid, secret.source) == (ATTESTED_GUID, GeneratedSource(form="bytes", size=ATTESTED_SIZE))


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("platforms", "spec: object missing required field `platforms`"),
        ("measure", "spec: needs measure (artefacts) or digests"),
    ],
)
def test_what_absence_would_open_is_refused(key: str, problem: str) -> None:
    assert problems(document(**{key: None})) == (problem,)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"callers": ["cluster"]}, "spec.callers[0]: must be spiffe://TRUST-DOMAIN/orchestrator/NAME"),
        ({"callers": ["spiffe://a.example/agent/x"]}, "spec.callers[0]: is not an orchestrator"),
        ({"callers": ["spiffe://a/orchestrator/x"] * 2}, "spec.callers: spiffe://a/orchestrator/x comes twice"),
        ({"platforms": {"generations": [], "chips": "any"}}, "spec.platforms.generations: names no generation"),
        ({"platforms": {"generations": ["zen"], "chips": "any"}}, "spec.platforms.generations[0]: must be one of"),
        ({"platforms": {"generations": ["rome"]}}, "spec.platforms: object missing required field `chips`"),
        ({"platforms": {"generations": ["rome"], "chips": []}}, "spec.platforms.chips: names no chip"),
        ({"platforms": {"generations": ["rome"], "chips": ["AB" * 32]}}, "spec.platforms.chips[0]: must be a CEK's"),
        ({"platforms": {**ANY, "ownership": "mine"}}, "spec.platforms.ownership: invalid enum value"),
        ({"platforms": {**ANY, "ownership": []}}, "spec.platforms.ownership: names no owner"),
        ({"platforms": {**ANY, "ownership": ["AB" * 32]}}, "spec.platforms.ownership[0]: must be an OCA's"),
        ({"platforms": {**ANY, "ownership": [CHIP, CHIP]}}, f"spec.platforms.ownership: {CHIP} comes twice"),
        ({"platforms": {**ANY, "ownership": "self"}}, "spec.platforms.ownership: self needs a list of chips"),
        ({"platforms": {"generations": ["turin"], "chips": "any"}}, "spec.floors.turin: is needed"),
        ({"floors": {"rome": "0.24.20"}}, "spec.floors.rome: is a floor for a generation that"),
        ({"floors": {"emulated": "1.2"}}, "spec.floors.emulated: a firmware version is written"),
        ({"floors": {"emulated": "0.16.9"}, "accept_old_firmware": "x"}, "spec.floors.emulated: must be at least"),
        ({"policy": {"allow": ["everything"]}}, "spec.policy.allow[0]: invalid enum value 'everything'"),
        ({"policy": {"allow": ["send", "send"]}}, "spec.policy.allow: send comes twice"),
        ({"policy": {"minimum_api": "55"}}, "spec.policy.minimum_api: must be major.minor"),
        ({"policy": {"minimum_api": "0.16"}}, "spec.policy.minimum_api: must be at least 0.17"),
        ({"policy": {"minimum_api": 1.55}}, "spec.policy.minimum_api: expected `str | null`, got `float`"),
        ({"policy": {"minimum_api": "none"}}, "spec.policy.minimum_api: none needs accept_old_firmware"),
        ({"accept_old_firmware": " "}, "spec.accept_old_firmware: is a reason, in words"),
        ({"accept_old_firmware": "w" * 1025}, "spec.accept_old_firmware: is a reason, in words, at most 1024 bytes"),
        ({"accept_old_firmware": "漏" * 342}, "spec.accept_old_firmware: is a reason, in words, at most 1024 bytes"),
        ({"digests": ["00" * 32]}, "spec: has both measure and digests"),
        ({"secret_area": 64}, "spec.secret_area: goes with digests"),
        ({"measure": measured(vcpus=None)}, "spec.measure.vcpus: lists no number of vCPUs"),
        ({"measure": measured(cpus=None)}, "spec.measure.cpus: lists no CPU type"),
        ({"measure": measured(vcpus=[0])}, "spec.measure.vcpus[0]: must be 1 to 64"),
        ({"measure": measured(vcpus=[65])}, "spec.measure.vcpus[0]: must be 1 to 64"),
        ({"measure": measured(vcpus=["4-2"])}, "spec.measure.vcpus[0]: must be 1 to 64"),
        ({"measure": measured(vcpus=["1-3", 2])}, "spec.measure.vcpus: 2 comes twice"),
        ({"measure": measured(cpus=["host"])}, "spec.measure.cpus[0]: a CPU is one of QEMU's"),
        ({"measure": measured(flavours=["snp"])}, "spec.measure.flavours[0]: must be one of legacy"),
        ({"measure": measured(kernel=None)}, "spec.measure: has an initrd or a command line but no kernel"),
        ({"measure": measured(cmdline="a\0b")}, "spec.measure.cmdline: holds a NUL"),
        ({"measure": measured(firmware="")}, "spec.measure.firmware: names no file"),
        ({"measure": measured(template="x")}, "spec.measure: object contains unknown field `template`"),
        ({"policy": {"allow": ["no-es"]}}, "spec.measure: lists vcpus, cpus or flavours, but without SEV-ES"),
        ({"measure": None, "digests": []}, "spec.digests: lists 0 launch digests"),
        ({"measure": None, "digests": ["xy"]}, "spec.digests[0]: must be 64 lower-case hex digits"),
        ({"measure": None, "digests": ["0a" * 32] * 2}, f"spec.digests: {'0a' * 32} comes twice"),
        ({"measure": None, "digests": ["00" * 32], "secret_area": 16}, "spec.secret_area: must be 32 to"),
        ({"secrets": [{"guid": "x", "source": {"file": "s"}}]}, "spec.secrets[0].guid: must be a GUID"),
        ({"secrets": [{"guid": str(UUID(int=0)), "source": {"file": "s"}}]}, "spec.secrets[0].guid: must be a GUID"),
        ({"secrets": [secret(), secret()]}, f"spec.secrets: {SECRET_GUID} comes twice"),
        ({"lifetime": "10"}, "spec.lifetime: must be 10s to 24h"),
        ({"lifetime": "9s"}, "spec.lifetime: must be 10s to 24h"),
        ({"lifetime": "25h"}, "spec.lifetime: must be 10s to 24h"),
        ({"quota": 3}, "spec: object contains unknown field `quota`"),
    ],
)
def test_a_bad_key_is_refused_with_its_path(spec: dict[str, Any], problem: str) -> None:
    assert any(each.startswith(problem) for each in problems(document(**spec))), problems(document(**spec))


def test_all_problems_are_listed_at_once() -> None:
    found = problems(document(callers=["cluster"], lifetime="1s", platforms={"generations": [], "chips": []}))
    assert [each.split(":")[0] for each in found] == [
        "spec.platforms.generations",
        "spec.callers[0]",
        "spec.platforms.chips",
        "spec.lifetime",
    ]


def test_another_kind_or_api_version_is_refused() -> None:
    kinds = "kind: must be one of Workload, Grant, Platform, Revocation"
    assert problems({**document(), "kind": "Pod"}) == problems({**document(), "kind": ["Workload"]}) == (kinds,)
    assert problems({key: value for key, value in document().items() if key != "kind"}) == (kinds,)
    assert problems({**document(), "apiVersion": "v2"}) == ("apiVersion: must be sevattest/v1, not 'v2'",)
    assert problems([])[0].startswith("a document is a mapping")  # type: ignore[arg-type]  # what YAML may give


def test_a_version_without_quotes_is_refused_with_advice() -> None:
    content = {**document(), "metadata": {"name": "web", "version": 1.10}}
    assert problems(content) == ("metadata.version: expected `str`, got `float`: put it into quotes",)


def test_each_missing_policy_bit_is_named() -> None:
    for name, bit in {"debug": 1, "key-sharing": 2, "send": 8}.items():
        workload = read(document(policy={"allow": [name]}))
        assert workload.bits == 0x0F & ~bit
        assert any(risk.startswith("the policy allows") for risk in workload.risks)
    plain = read(document(policy={"allow": ["no-es"]}, measure=measured(vcpus=None, cpus=None, flavours=None)))
    assert plain.bits == 0x0B
    assert read(document(policy={"domain": True})).bits == 0x1F


@pytest.mark.parametrize("minimum", ["0.17", "1.20", "1.99"])
def test_the_policys_api_is_the_higher_of_document_and_floor(minimum: str) -> None:
    content = document(platforms={"generations": ["rome", "milan"], "chips": "any"}, policy={"minimum_api": minimum})
    asked = tuple(map(int, minimum.split(".")))
    assert read(content).guest_policy("rome").minimum_api == max(asked, (0, 24))
    assert read(content).guest_policy("milan").minimum_api == max(asked, (1, 55))


def test_a_floor_can_be_raised_freely_and_lowered_only_with_a_reason() -> None:
    rome = {"generations": ["rome"], "chips": "any"}
    assert read(document(platforms=rome, floors={"rome": "0.24.30"})).floors["rome"] == (0, 24, 30)
    assert problems(document(platforms=rome, floors={"rome": "0.24.15"})) == (
        "spec.floors.rome: is below 0.24.20, the oldest known good: accept_old_firmware with a reason",
    )
    workload = read(document(platforms=rome, floors={"rome": "0.24.15"}, accept_old_firmware="lab only"))
    assert workload.floors["rome"] == (0, 24, 15)
    assert any("lab only" in risk for risk in workload.risks)


def test_the_known_case_of_the_procedure_by_hand_is_a_document() -> None:
    # An EPYC 7302 under policy 5, API 0.24 build 15, 8 vCPUs of EPYC-Rome, no direct boot.
    workload = read(
        document(
            measure={"firmware": "OVMF.fd", "vcpus": [8], "cpus": ["EPYC-Rome"]},
            policy={"allow": ["key-sharing", "send"], "minimum_api": "none"},
            platforms={"generations": ["rome"], "chips": "any"},
            floors={"rome": "0.24.15"},
            accept_old_firmware="the account's own machine",
        )
    )
    assert workload.guest_policy("rome").value == 5
    assert workload.floors["rome"] == FirmwareVersion(0, 24, 15)


def test_cautious_generations_come_with_a_warning() -> None:
    naples = read(document(platforms={"generations": ["naples"], "chips": "any"}))
    assert any("naples" in warning for warning in naples.warnings)
    assert not read(document(platforms={"generations": ["milan"], "chips": "any"})).warnings


def test_every_generation_has_a_floor_with_a_source_or_a_reason_to_ask_for_one() -> None:
    for generation in GENERATIONS.values():
        assert generation.source
        assert generation.floor is not None or generation.caution
        assert generation.risks


def test_ranges_and_all_flavours_span_the_shapes() -> None:
    workload = read(document(measure=measured(vcpus=["1-3", 8], flavours="all")))
    assert workload.artefacts is not None
    assert workload.artefacts.vcpus == (1, 2, 3, 8)
    assert workload.artefacts.flavours == tuple(Flavour)


def test_two_names_of_one_processor_are_one_shape() -> None:
    workload = read(document(measure=measured(cpus=["EPYC-Rome", "EPYC-Rome-v2", "EPYC-Milan"])))
    assert workload.artefacts is not None
    assert [cpu.name for cpu in workload.artefacts.cpus] == ["EPYC-Rome", "EPYC-Milan"]


def test_more_than_512_launch_digests_are_refused_and_512_are_not() -> None:
    cpus = ["EPYC-Rome", "EPYC-Milan"]
    flavours = ["legacy", "init2", "legacy+debug-swap", "init2+debug-swap"]
    read(document(measure=measured(vcpus=["1-64"], cpus=cpus, flavours=flavours)))
    found = problems(document(measure=measured(vcpus=["1-64"], cpus=cpus, flavours="all")))
    assert found == ("spec.measure: spans 640 launch digests, at most 512 are frozen for a launch",)


def test_listed_digests_carry_labels_and_an_area() -> None:
    content = document(measure=None, digests=["00" * 32, {"digest": "11" * 32, "label": "four vCPUs"}])
    workload = read(content)
    assert [(each.digest[0], each.label) for each in workload.digests] == [(0, "digest 1"), (0x11, "four vCPUs")]
    assert workload.secret_area == SECRET_AREA_DEFAULT
    assert read(document(measure=None, digests=["00" * 32], secret_area=4096)).secret_area == 4096


def test_versions_sort_naturally() -> None:
    versions = ["1.10", "1.9", "1.9.1", "2", "1.9b", "10"]
    assert sorted(versions, key=version_order) == ["1.9", "1.9.1", "1.9b", "1.10", "2", "10"]
    assert version_order("1.0") == version_order("01.000") != version_order("1.")
    assert version_order("0") < version_order("1")


@pytest.mark.parametrize("text", ["²", "٣", "9" * 5000, "", "1." + "0" * 5000])
def test_any_text_has_a_place_among_versions(text: str) -> None:
    assert version_order(text) < version_order(text + "a")
    assert version_order("9" * 5000) < version_order("1" + "0" * 5000)


@pytest.mark.parametrize("callers", [None, []])
def test_a_workload_may_name_no_callers(callers: list[str] | None) -> None:
    workload = read(document(callers=callers))
    assert workload.callers == frozenset()
    assert not any(each.startswith("spec.callers") for each in workload.warnings)


def test_whose_platforms_are_allowed_is_anybodys_nobodys_or_listed() -> None:
    chips = {"generations": ["milan"], "chips": [CHIP]}
    assert read(document(platforms=chips)).ownership == "any"
    assert read(document(platforms={**ANY, "ownership": "any"})).ownership == "any"
    assert read(document(platforms={**chips, "ownership": "self"})).ownership == "self"
    assert read(document(platforms={**ANY, "ownership": ["cd" * 32]})).ownership == frozenset({"cd" * 32})


def source(value: Any) -> dict[str, Any]:
    return document(secrets=[{"guid": str(SECRET_GUID), "source": value}])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ({"file": "secret"}, FileSource(path="/owner/secret")),
        ({"file": "/run/secret"}, FileSource(path="/run/secret")),
        ({"stored": "disk"}, StoredSource(name="disk")),
        ({"stored": {"name": "disk"}}, StoredSource(name="disk")),
        ({"stored": {"name": "disk", "version": 3}}, StoredSource(name="disk", version=3)),
        (
            {"vault": {"mount": "kv", "path": "guests/web", "field": "key"}},
            VaultSource(mount="kv", path="guests/web", field="key"),
        ),
        (
            {"vault": {"mount": "kv", "path": "web", "field": "k", "base64": True, "version": 2}},
            VaultSource(mount="kv", path="web", field="k", base64=True, version=2),
        ),
        ({"generated": "bytes"}, GeneratedSource(form="bytes", size=32)),
        ({"generated": "passphrase"}, GeneratedSource(form="passphrase", size=32)),
        ({"generated": {"size": 64}}, GeneratedSource(form="bytes", size=64)),
        ({"generated": {"form": "passphrase", "size": 26}}, GeneratedSource(form="passphrase", size=26)),
        ({"generated": {"size": 16}}, GeneratedSource(form="bytes", size=16)),
        ({"generated": {"size": 512}}, GeneratedSource(form="bytes", size=512)),
    ],
)
def test_a_secret_comes_from_one_of_four_sources(text: Any, wanted: Source) -> None:
    (found,) = read(source(text)).secrets
    assert found.source == wanted


VAULT = {"mount": "kv", "path": "guests/web", "field": "key"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ({}, ": needs exactly one of file, stored, vault and generated"),
        ({"file": "a", "stored": "b"}, ": needs exactly one of"),
        ({"stored": "b", "generated": "bytes"}, ": needs exactly one of"),
        ({"value": "s"}, ": object contains unknown field `value`"),
        ("secret", ": expected `object`, got `str`"),
        ({"file": ""}, ".file: names no file"),
        ({"file": "a\0b"}, ".file: names no file"),
        ({"stored": ""}, ".stored: must be 1 to 128 of"),
        ({"stored": {"name": "../x"}}, ".stored.name: must be 1 to 128 of"),
        ({"stored": {"name": "x", "version": 0}}, ".stored.version: must be 1 to"),
        ({"stored": {"name": "x", "version": 2**31}}, ".stored.version: must be 1 to"),
        ({"stored": {"name": "x", "version": True}}, ".stored.version: expected"),
        ({"stored": {"version": 1}}, ".stored: object missing required field `name`"),
        ({"vault": {"mount": "kv", "path": "web"}}, ".vault: object missing required field `field`"),
        ({"vault": {**VAULT, "token": "t"}}, ".vault: object contains unknown field `token`"),
        ({"vault": {**VAULT, "mount": ""}}, ".vault.mount: must be parts of"),
        ({"vault": {**VAULT, "mount": "/kv"}}, ".vault.mount: must be parts of"),
        ({"vault": {**VAULT, "path": "guests/../sys"}}, ".vault.path: must be parts of"),
        ({"vault": {**VAULT, "path": "guests//web"}}, ".vault.path: must be parts of"),
        ({"vault": {**VAULT, "path": "web?list=true"}}, ".vault.path: must be parts of"),
        ({"vault": {**VAULT, "path": "web\n"}}, ".vault.path: must be parts of"),
        ({"vault": {**VAULT, "field": ""}}, ".vault.field: must be 1 to 128 characters"),
        ({"vault": {**VAULT, "version": -1}}, ".vault.version: must be 1 to"),
        ({"generated": "uuid"}, ".generated: invalid enum value"),
        ({"generated": {"form": "uuid"}}, ".generated.form: invalid enum value"),
        ({"generated": {"size": 15}}, ".generated.size: must be 16 to 512 for bytes"),
        ({"generated": {"size": 513}}, ".generated.size: must be 16 to 512 for bytes"),
        ({"generated": {"form": "passphrase", "size": 25}}, ".generated.size: must be 26 to 512 for passphrase"),
    ],
)
def test_a_bad_source_is_refused_with_its_path(text: Any, problem: str) -> None:
    (found,) = problems(source(text))
    assert found.startswith(f"spec.secrets[0].source{problem}"), found


def test_the_problems_of_all_secrets_are_told() -> None:
    bad = {"guid": "x", "source": {"file": ""}}
    assert [each.split(":")[0] for each in problems(document(secrets=[bad, {**bad, "source": {}}]))] == [
        "spec.secrets[0].guid",
        "spec.secrets[0].source.file",
        "spec.secrets[1].guid",
        "spec.secrets[1].source",
    ]


def test_two_spellings_of_one_version_are_one() -> None:
    assert among("1.0", ["1.00", "2"])
    assert not among("1.0", ["1.1", "1"])
