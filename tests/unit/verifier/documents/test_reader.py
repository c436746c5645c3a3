"""All kinds of document: any text is one or is refused, and what is written out reads as the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support import documents
from verifier.documents import form, form_grant, form_platform, form_revocation, form_workload
from verifier.documents.reader import FORMS, KINDS, Document, kind_of, read_document, written_out
from verifier.documents.text import InvalidDocument, spelled_as_json

ALL = [documents.workload(), documents.grant(), documents.platform(), documents.revocation()]
FOLDER = PurePath("/owner")
PAGES = Path(__file__).parents[4] / "docs"


def read(text: bytes, *, is_json: bool) -> Document:
    return read_document(text, is_json=is_json, folder=FOLDER, source="a")


def kind_or_problems(text: bytes, *, is_json: bool) -> str | tuple[str, ...]:
    """The kind that was read, or what was found; anything else that is raised fails the test."""
    try:
        return kind_of(read(text, is_json=is_json))
    except InvalidDocument as error:
        return error.problems


@pytest.mark.parametrize("content", ALL, ids=KINDS)
def test_each_kind_is_read_from_yaml_and_from_json(content: dict[str, Any]) -> None:
    text = json.dumps(content).encode()
    found = read(text, is_json=True)
    assert kind_of(found) == content["kind"]
    assert found == replace(documents.read(content), sha256=found.sha256, source="a")


@pytest.mark.parametrize("content", ALL, ids=KINDS)
def test_what_is_written_out_reads_as_the_same_document(content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content).encode()
    full = written_out(text, is_json=False).encode()
    assert len(json.loads(full)["spec"]) > len(content["spec"])
    found = read(full, is_json=True)
    assert found == replace(read(text, is_json=False), sha256=found.sha256)
    assert written_out(full, is_json=True).encode() == full


def test_what_is_no_document_is_not_written_out() -> None:
    with pytest.raises(InvalidDocument):
        written_out(b"kind: Grant", is_json=False)


@pytest.mark.parametrize("content", ALL, ids=KINDS)
def test_another_kinds_spec_is_refused(content: dict[str, Any]) -> None:
    for kind in set(KINDS) - {content["kind"]}:
        with pytest.raises(InvalidDocument):
            documents.read({**content, "kind": kind})


@pytest.mark.parametrize("content", ALL, ids=KINDS)
def test_an_unknown_key_is_refused_with_its_path(content: dict[str, Any]) -> None:
    for where, path in ((content, ""), (content["metadata"], "metadata: "), (content["spec"], "spec: ")):
        changed = json.loads(json.dumps(content))
        inner = changed if where is content else changed[path[:-2]]
        inner["colour"] = "red"
        with pytest.raises(InvalidDocument) as caught:
            documents.read(changed)
        assert caught.value.problems == (f"{path}object contains unknown field `colour`",)


def problems(content: dict[str, Any], **spec: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidDocument) as caught:
        documents.read({**content, "spec": {**content["spec"], **spec}})
    return caught.value.problems


def test_all_that_has_no_place_in_a_form_is_said_at_once() -> None:
    changed = documents.grant(launches="10", at_once=2.5, suspended="yes", colour="red", callers=["a", 1, None])
    changed["metadata"] = {"version": 1.0}
    del changed["spec"]["workload"]
    assert sorted(problems(changed)) == sorted(
        (
            "metadata.version: expected `str`, got `float`: put it into quotes",
            "metadata: object missing required field `name`",
            "spec.callers[1]: expected `str`, got `int`: put it into quotes",
            "spec.callers[2]: expected `str`, got `null`",
            "spec.launches: expected `int`, got `str`",
            "spec.at_once: expected `int`, got `float`",
            "spec.suspended: expected `bool`, got `str`",
            "spec: object contains unknown field `colour`",
            "spec: object missing required field `workload`",
        )
    )


def test_what_lies_deeper_is_said_with_its_path_too() -> None:
    secrets = [
        {"guid": 1, "source": {"stored": {"name": "x", "version": "2"}}},
        {"source": {"vault": {"mount": "kv", "path": 7}}},
        {"guid": "g", "source": {"generated": "words"}},
        "secret",
    ]
    measure = {"firmware": "f", "vcpus": [1, 2.5, None], "flavours": 1}
    found = problems(
        documents.workload(),
        measure=measure,
        secrets=secrets,
        floors={"milan": 1.5, "rome": "1.2.3", "naples": None},
        platforms="any",
        digests=["d", 1, {"digest": "d"}],
        policy={"allow": ["no-es", "all"], "domain": 1},
    )
    assert sorted(each.partition(": ")[0] for each in found) == [
        "spec.digests[1]",
        "spec.digests[2]",
        "spec.floors.milan",
        "spec.floors.naples",
        "spec.measure.flavours",
        "spec.measure.vcpus[1]",
        "spec.measure.vcpus[2]",
        "spec.platforms",
        "spec.policy.allow[1]",
        "spec.policy.domain",
        "spec.secrets[0].guid",
        "spec.secrets[0].source.stored.version",
        "spec.secrets[1]",
        "spec.secrets[1].source.vault",
        "spec.secrets[1].source.vault.path",
        "spec.secrets[2].source.generated",
        "spec.secrets[3]",
    ]


@given(data=st.data())
def test_each_problem_of_a_value_is_found_where_it_is_alone(data: st.DataObject) -> None:
    """What is said of several wrong values is what is said of each alone, and nothing is wrong without a word."""
    content = json.loads(json.dumps(data.draw(st.sampled_from(ALL))))
    keys = data.draw(st.lists(st.sampled_from(sorted(content["spec"])), min_size=1, max_size=3, unique=True))
    values = {key: data.draw(_values(4)) for key in keys}

    def said(changes: dict[str, Any]) -> set[str]:
        try:
            form.fill_in(FORMS[content["kind"]], {**content, "spec": {**content["spec"], **changes}})
        except InvalidDocument as error:
            return set(error.problems)
        return set()

    assert said(values) == set().union(*(said({key: value}) for key, value in values.items()))


def test_a_text_that_begins_with_a_brace_is_json() -> None:
    assert spelled_as_json(b' \n{"kind": 1}')
    assert not spelled_as_json(b"kind: Grant")
    assert not spelled_as_json(b"")


_TEXTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(str.encode),
)


@given(text=_TEXTS, is_json=st.booleans())
def test_any_bytes_are_a_document_or_refused(text: bytes, is_json: bool) -> None:  # noqa: FBT001 -- hypothesis' choice
    assert kind_or_problems(text, is_json=is_json)


def _values(depth: int) -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["any", "1/1m", "web"]),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
        max_leaves=depth,
    )


@given(data=st.data())
def test_any_value_in_a_keys_place_is_read_or_refused(data: st.DataObject) -> None:
    content = json.loads(json.dumps(data.draw(st.sampled_from(ALL))))
    full = json.loads(written_out(json.dumps(content).encode(), is_json=True))
    inner = full["spec"]
    key = data.draw(st.sampled_from(sorted(inner)))
    while isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(sorted(inner)))
    inner[key] = data.draw(_values(6))
    assert kind_or_problems(json.dumps(full).encode(), is_json=True)


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("workload.md", form_workload),
        ("grants.md", form_grant),
        ("platforms.md", form_platform),
        ("revocations.md", form_revocation),
    ],
)
def test_the_page_describes_every_key(page: str, module: Any) -> None:
    text = (PAGES / page).read_text()
    structs = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    keys = {field.encode_name for each in structs for field in msgspec.structs.fields(each)}
    assert {"name", "version", "spec"} <= keys
    assert form.MetadataForm in structs
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def _examples(page: str) -> list[str]:
    return [each.split("```")[0] for each in (PAGES / page).read_text().split("```yaml\n")[1:]]


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("workload.md", "Workload"),
        ("grants.md", "Grant"),
        ("platforms.md", "Platform"),
        ("revocations.md", "Revocation"),
    ],
)
def test_the_pages_examples_are_good_documents(page: str, kind: str) -> None:
    whole = [each for each in _examples(page) if each.startswith("apiVersion")]
    assert whole
    for text in whole:
        assert kind_of(read(text.encode(), is_json=False)) == kind


def test_the_example_of_the_procedure_by_hand_fits_into_a_document() -> None:
    (part,) = [each for each in _examples("workload.md") if each.startswith("spec:")]
    spec = yaml.safe_load(part)["spec"]
    assert kind_of(documents.read(documents.workload(**spec))) == "Workload"
