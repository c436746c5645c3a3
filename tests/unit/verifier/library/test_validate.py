"""A document before it is kept: problems, conflicts with what is on file, and warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import Reason, WrongState
from tests.support.documents import (
    CALLER,
    SECRET_GUID,
    STRANGER,
    AppliedDocuments,
    grant,
    platform,
    revocation,
    row,
    workload,
    write_artefacts,
    write_document,
)
from tests.support.recording_log import RecordingLog
from tests.support.store_rows import SEAL
from verifier.documents.text import InvalidDocument
from verifier.library.library import Library
from verifier.library.validate import Checked, check_document


class Owner:
    """What is on file, and the secrets in the store."""

    def __init__(self, folder: Path) -> None:
        write_artefacts(folder)
        self.folder = folder
        self.rows = AppliedDocuments()
        self.secrets: set[tuple[str, int]] = {("disk", 1)}

    async def has_secret(self, name: str, version: int | None) -> bool:
        return any(name == known and version in {None, number} for known, number in self.secrets)

    async def check(self, content: dict[str, Any]) -> Checked:
        library = Library(self.folder, self.rows, SEAL, RecordingLog())
        text = json.dumps(content).encode()
        return await check_document(library, text, is_json=True, has_secret=self.has_secret)

    async def warnings(self, content: dict[str, Any]) -> tuple[str, ...]:
        return (await self.check(content)).warnings

    async def conflict(self, content: dict[str, Any]) -> str:
        with pytest.raises(WrongState) as caught:
            await self.check(content)
        assert caught.value.reason is Reason.DOCUMENT_CONFLICT
        return caught.value.message


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "documents")


def milan(*names: str, **spec: Any) -> dict[str, Any]:
    return workload(*names, platforms={"generations": ["milan"], "chips": "any"}, **spec)


async def test_a_good_document_is_described_without_warnings(owner: Owner) -> None:
    owner.rows.apply(milan(), platform())
    checked = await owner.check(grant(platforms={"names": ["host-1"], "pools": ["rack-1"]}))
    assert (checked.entry.kind, checked.entry.name, checked.entry.version) == ("Grant", "fleet", "1")
    assert checked.warnings == ()
    assert checked.revision == 1
    assert await owner.warnings(milan()) == ()
    assert await owner.warnings(platform()) == ()
    assert await owner.warnings(revocation()) == ()
    assert owner.rows.number == 1


async def test_every_problem_is_told(owner: Owner) -> None:
    with pytest.raises(InvalidDocument) as caught:
        await owner.check(grant(launches=0, at_once=0))
    assert len(caught.value.problems) == 2


async def test_files_outside_the_folder_are_problems_each_with_its_path(owner: Owner) -> None:
    measure = {**milan()["spec"]["measure"], "firmware": "/boot/ovmf.fd", "kernel": "../kernel", "initrd": "a/../b"}
    secrets = [{"guid": str(SECRET_GUID), "source": {"file": str(owner.folder / "secret")}}]
    with pytest.raises(InvalidDocument) as caught:
        await owner.check(milan(measure=measure, secrets=secrets))
    assert [each.partition(": ")[0] for each in caught.value.problems] == [
        "spec.measure.firmware",
        "spec.measure.kernel",
        "spec.measure.initrd",
        "spec.secrets[0].source.file",
    ]
    assert all("must be a path in the folder of documents" in each for each in caught.value.problems)


async def test_what_a_link_in_the_folder_leads_to_is_whoever_keeps_the_folder(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    (owner.folder / "link").symlink_to(tmp_path / "elsewhere")
    secrets = [{"guid": str(SECRET_GUID), "source": {"file": "link"}}]
    assert await owner.warnings(milan(secrets=secrets)) == ()


async def test_artefacts_that_cannot_be_measured_are_a_problem(owner: Owner) -> None:
    (owner.folder / "kernel").unlink()
    with pytest.raises(InvalidDocument, match=r"spec.measure: .*kernel: no such file"):
        await owner.check(milan())


async def test_what_is_in_the_folder_is_changed_there(owner: Owner) -> None:
    write_document(owner.folder, milan())
    assert "is in the folder, in web.yaml" in await owner.conflict(milan("web", "2"))
    assert (await owner.check(milan("db"))).entry.name == "db"
    # Another kind's name is another name.
    assert (await owner.check(grant("web"))).entry.kind == "Grant"


async def test_a_version_is_kept_once(owner: Owner) -> None:
    owner.rows.apply(grant("fleet", "1.0"))
    assert "on file with another text" in await owner.conflict(grant("fleet", "1.0", launches=11))
    assert "on file with another text" in await owner.conflict(grant("fleet", "1.00"))
    assert (await owner.check(grant("fleet", "1.0"))).entry.version == "1.0"
    assert (await owner.check(grant("fleet", "1.1", launches=11))).entry.version == "1.1"


async def test_two_platforms_have_two_chips(owner: Owner) -> None:
    owner.rows.apply(platform())
    assert "is the chip of platform host-1 already" in await owner.conflict(platform("host-2"))
    assert (await owner.check(platform("host-1", "2"))).entry.version == "2"
    assert (await owner.check(platform("host-2", cek="cd" * 32))).entry.name == "host-2"


async def test_an_older_version_stays_out_of_force_and_a_warning_says_so(owner: Owner) -> None:
    owner.rows.apply(milan("web", "2"), grant("fleet", "2"))
    # Whatever it would do in force, and whatever is amiss with it: it does nothing.
    lost = [{"guid": str(SECRET_GUID), "source": {"stored": "nothing"}}]
    for older in (grant("fleet", "1", suspended=True), milan("web", "1", policy={"allow": ["debug"]}, secrets=lost)):
        checked = await owner.check(older)
        assert (checked.newer, checked.warnings) == ("2", ("metadata.version: 2 is newer and stays in force",))
    checked = await owner.check(grant("fleet", "3", suspended=True))
    assert checked.newer == ""
    assert checked.warnings == ("spec.suspended: nothing is begun or released under this grant",)


async def test_a_newer_version_that_cannot_be_read_keeps_an_older_one_out_of_force(owner: Owner) -> None:
    owner.rows.put(row(grant("fleet", "10"), text=b'{"kind": "Grant", "colour": "red"}'))
    assert (await owner.check(grant("fleet", "9"))).newer == "10"


async def test_names_that_lead_nowhere_are_warnings(owner: Owner) -> None:
    spec = {"platforms": {"names": ["host-1"], "pools": ["rack-1"]}, "at_once": 11, "suspended": True}
    assert await owner.warnings(grant(**spec)) == (
        "spec.workload: there is no workload web",
        "spec.suspended: nothing is begun or released under this grant",
        "spec.at_once: is more than launches, which is 10",
        "spec.platforms.names: there is no platform host-1",
        "spec.platforms.pools: no platform is in pool rack-1",
    )
    revoked = {"workloads": [{"name": "web", "versions": "any"}]}
    assert await owner.warnings(revocation(**revoked)) == ("spec.workloads: there is no workload web",)
    owner.rows.apply(milan(), platform())
    assert await owner.warnings(revocation(**revoked)) == ()
    assert await owner.warnings(grant(**{**spec, "at_once": 10, "suspended": False})) == ()


async def test_a_grant_for_versions_that_are_not_in_force_is_a_warning(owner: Owner) -> None:
    owner.rows.apply(milan("web", "1.0"))
    assert await owner.warnings(grant(versions=["2"])) == ("spec.versions: 1.0 is in force, and not among them",)
    assert await owner.warnings(grant(versions=["1.00"])) == ()


async def test_a_workload_that_nobody_can_launch_is_a_warning(owner: Owner) -> None:
    nobody = milan(callers=[])
    assert any("nobody can launch it" in each for each in await owner.warnings(nobody))
    owner.rows.apply(grant())
    assert not any("nobody can launch it" in each for each in await owner.warnings(nobody))
    assert await owner.warnings(milan(callers=[CALLER])) == ()


async def test_a_grant_for_a_caller_that_needs_none_is_a_warning_on_both_sides(owner: Owner) -> None:
    third = "spiffe://datacenter.example/orchestrator/third"
    owner.rows.apply(milan(callers=[CALLER, third]), grant("mine", callers=[CALLER, STRANGER]))
    assert await owner.warnings(grant("all", callers=[CALLER, STRANGER, third])) == (
        f"spec.callers: {CALLER} (and 1 more) may launch web without a grant, so this one is no limit there",
    )
    assert await owner.warnings(milan("web", "2", callers=[CALLER])) == (
        f"spec.callers: {CALLER} may launch it without a grant, so grant mine is no limit there",
    )
    assert await owner.warnings(grant("all", callers=[STRANGER])) == ()
    assert await owner.warnings(milan("web", "2", callers=[third])) == ()


async def test_secrets_that_are_not_there_are_warnings(owner: Owner) -> None:
    def source(value: dict[str, Any]) -> dict[str, Any]:
        return milan(secrets=[{"guid": str(SECRET_GUID), "source": value}])

    path = "spec.secrets[0].source"
    assert await owner.warnings(source({"stored": "key"})) == (f"{path}.stored: there is no secret key",)
    pinned = {"stored": {"name": "disk", "version": 2}}
    assert await owner.warnings(source(pinned)) == (f"{path}.stored: there is no secret disk in version 2",)
    assert await owner.warnings(source({"stored": "disk"})) == ()
    assert await owner.warnings(source({"stored": {"name": "disk", "version": 1}})) == ()
    (warning,) = await owner.warnings(source({"file": "gone"}))
    assert warning.startswith(f"{path}.file: ")
    assert await owner.warnings(source({"generated": "passphrase"})) == ()
