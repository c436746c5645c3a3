"""Release: the guest that was measured gets its secrets, and the receipt says what was released to what."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from common.sev.secret import SecretEntry
from emulator.errors import FirmwareFailed
from tests.support.desk import KEK, desk
from tests.support.documents import SECRET, SECRET_GUID, write_document
from tests.support.documents import workload as document
from tests.support.releases import last_record, ready, spent
from verifier.documents.workload import ATTESTED_GUID
from verifier.keys.base import launch_place
from verifier.keys.file import FileKey
from verifier.secrets.release import read_generated


async def test_the_measured_guest_and_only_it_gets_the_secret(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        released = await d.release(begun.launch.launch_id, blob)
        assert guest.open(released, blob) == (SecretEntry(guid=SECRET_GUID, data=SECRET),)
        assert await spent(d, begun) == ("released", None)
        other = d.start(await d.begin())
        with pytest.raises(FirmwareFailed):
            other.open(released, blob)
        with pytest.raises(FirmwareFailed):
            guest.open(released, guest.measure(bytes(32)))


async def test_every_listed_shape_is_accepted_and_named_in_the_receipt(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        seen = []
        for digest in await d.digests():
            begun = await d.begin()
            released = await d.release(begun.launch.launch_id, d.start(begun).measure(digest))
            receipt = d.receipt(released)
            assert receipt["digest"] == digest.hex()
            seen.append((receipt["shape"]["vcpus"], receipt["shape"]["flavour"]))
        assert seen == [(1, "legacy"), (1, "init2"), (2, "legacy"), (2, "init2"), (4, "legacy"), (4, "init2")]


async def test_the_receipt_says_what_was_released_to_what(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        released = await d.release(begun.launch.launch_id, blob)
        receipt = d.receipt(released)
        record = last_record(d, begun)
        assert receipt["launch_id"] == str(begun.launch.launch_id)
        assert receipt["workload"]["name"] == "web"
        assert receipt["policy"]["value"] == begun.policy
        assert receipt["firmware"] == "1.55.24"
        assert receipt["platform"] == {
            "generation": "emulated",
            "emulated": True,
            "chip": d.dependencies.pseudonyms.of(d.platform.chain.cek.fingerprint.hex()),
        }
        assert receipt["secrets"] == [str(SECRET_GUID)]
        assert any("emulated" in note for note in receipt["notes"])
        assert receipt["audit_id"] == str(d.audit(begun.launch.launch_id)[-1].audit_id)
        assert record["event"] == "launch.released"
        assert SECRET.decode().strip() not in released.receipt


async def test_plain_sev_says_what_it_does_not_measure(tmp_path: Path) -> None:
    measure = {"firmware": "ovmf.fd", "kernel": "kernel"}
    async with desk(tmp_path, content=document(policy={"allow": ["no-es"]}, measure=measure)) as d:
        begun, guest, blob = await ready(d)
        released = await d.release(begun.launch.launch_id, blob)
        assert guest.open(released, blob)
        assert d.receipt(released)["shape"] == {
            "note": "plain SEV: the number of vCPUs and the CPU type are not measured"
        }


async def test_a_listed_digest_is_named_by_its_label(tmp_path: Path) -> None:
    content = document(measure=None, digests=["00" * 32, {"digest": "11" * 32, "label": "four vCPUs"}])
    async with desk(tmp_path, content=content) as d:
        begun = await d.begin()
        released = await d.release(begun.launch.launch_id, d.start(begun).measure(b"\x11" * 32))
        assert d.receipt(released)["shape"]["label"] == "four vCPUs"


async def test_without_listed_secrets_the_guest_gets_32_bytes_of_its_own(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(secrets=None)) as d:
        values = set()
        for _ in range(2):
            begun, guest, blob = await ready(d)
            (entry,) = guest.open(await d.release(begun.launch.launch_id, blob), blob)
            assert (entry.guid, len(entry.data)) == (ATTESTED_GUID, 32)
            values.add(entry.data)
            # The owner can find it again, and nobody else.
            sealed = await d.store.generated(begun.launch.launch_id)
            assert sealed is not None
            kept = FileKey(KEK).unseal(sealed, launch_place(begun.launch.launch_id, "generated"))
            assert read_generated(kept) == (entry,)
        assert len(values) == 2


async def test_a_trailing_nul_is_added_where_asked(tmp_path: Path) -> None:
    secret = {"guid": str(SECRET_GUID), "source": {"file": "secret"}, "trailing_nul": True}
    async with desk(tmp_path, content=document(secrets=[secret])) as d:
        begun, guest, blob = await ready(d)
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == SECRET + b"\0"


async def test_a_rotated_secret_is_read_at_release(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        (d.documents / "secret").write_bytes(b"rotated")
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == b"rotated"


async def test_a_newer_version_of_the_document_counts_for_the_next_launch(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        newer = document(secrets=[{"guid": str(UUID(int=5)), "source": {"file": "kernel"}}])
        newer["metadata"]["version"] = "2"
        write_document(d.documents, newer, "newer.yaml")
        await d.library.load()
        begun, guest, blob = await ready(d)
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == b"the kernel"
