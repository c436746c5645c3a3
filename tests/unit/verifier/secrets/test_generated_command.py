"""`sev-verifier generated`: what was made for a launch, for who has the store and the key, and for nobody else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import InvalidInput, NotFound, Reason, Unavailable
from tests.e2e.luks import make_volume
from tests.support.secret_rows import SecretRowsInMemory
from tests.support.spellings import shown_in
from verifier.documents.sources import GeneratedSource
from verifier.documents.workload import SecretSpec
from verifier.keys.base import launch_place
from verifier.keys.file import FileKey
from verifier.secrets.generated_command import find_generated, hand_over
from verifier.secrets.release import generated_secrets
from verifier.secrets.router import Secrets

KEY = FileKey(bytes(range(32)))
LAUNCH = UUID("0d6a8e0c-5a86-4a05-8f43-8d5f4a6f0a11")
DISK, TOKEN = UUID(int=1), UUID(int=2)
SPECS = [
    SecretSpec(guid=DISK, source=GeneratedSource(form="passphrase", size=80), trailing_nul=True),
    SecretSpec(guid=TOKEN, source=GeneratedSource(size=40)),
]
CRYPTSETUP = shutil.which("cryptsetup", path="/usr/sbin:/sbin:/usr/bin:/bin")


async def released() -> tuple[SecretRowsInMemory, dict[UUID, bytes]]:
    """A store after a release, and what the guest was given."""
    entries = await Secrets().read(SPECS)
    kept = generated_secrets(SPECS, entries)
    assert kept is not None
    store = SecretRowsInMemory()
    store.kept[LAUNCH] = KEY.seal(kept, launch_place(LAUNCH, "generated"))
    return store, {entry.guid: entry.data for entry in entries}


async def test_all_that_was_made_is_found_or_one_of_it() -> None:
    store, given = await released()
    found = {entry.guid: entry.data for entry in await find_generated(store, KEY, LAUNCH)}
    assert found == {DISK: given[DISK].removesuffix(b"\0"), TOKEN: given[TOKEN]}
    assert [entry.guid for entry in await find_generated(store, KEY, LAUNCH, TOKEN)] == [TOKEN]
    for launch, guid in ((uuid4(), None), (LAUNCH, UUID(int=3))):
        with pytest.raises(NotFound):
            await find_generated(store, KEY, launch, guid)


async def test_another_launch_s_blob_or_another_key_opens_nothing() -> None:
    store, _ = await released()
    other = uuid4()
    store.kept[other] = store.kept[LAUNCH]
    for launch, key in ((other, KEY), (LAUNCH, FileKey(bytes(range(1, 33))))):
        with pytest.raises(Unavailable) as caught:
            await find_generated(store, key, launch)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_it_is_printed_in_hex_or_written_as_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    store, given = await released()
    entries = await find_generated(store, KEY, LAUNCH)
    assert hand_over(entries, None) == (f"{DISK} {given[DISK][:-1].hex()}", f"{TOKEN} {given[TOKEN].hex()}")
    out = tmp_path / "out"
    assert hand_over(entries[:1], out) == ()
    assert out.read_bytes() == given[DISK][:-1]
    assert out.stat().st_mode & 0o777 == 0o600


async def test_several_fit_into_no_file_and_a_file_is_not_overwritten(tmp_path: Path) -> None:
    store, given = await released()
    entries = await find_generated(store, KEY, LAUNCH)
    out = tmp_path / "out"
    with pytest.raises(InvalidInput, match="takes one secret and there are 2") as caught:
        hand_over(entries, out)
    assert not out.exists()
    assert not shown_in(given[TOKEN], repr(caught.value), repr(entries))
    out.write_text("mine")
    with pytest.raises(InvalidInput, match="is never overwritten"):
        hand_over(entries[:1], out)
    assert out.read_text() == "mine"


def opens(volume: Path, passphrase: bytes) -> bool:
    """Whether cryptsetup opens the volume, given the passphrase as an initramfs gives it."""
    assert CRYPTSETUP is not None
    words = ["open", "--test-passphrase", "--type", "luks2", "--disable-locks", "--tries", "1", "--key-file", "-"]
    done = subprocess.run([CRYPTSETUP, *words, str(volume)], input=passphrase, capture_output=True, check=False)
    assert done.returncode in (0, 2), done.stderr  # 2: no key available with this passphrase
    return done.returncode == 0


@pytest.mark.skipif(CRYPTSETUP is None, reason="cryptsetup not found, install Debian's cryptsetup-bin")
async def test_a_real_luks_volume_opens_with_what_was_generated_and_with_nothing_else(tmp_path: Path) -> None:
    store, given = await released()
    (entry,) = await find_generated(store, KEY, LAUNCH, DISK)
    volume = tmp_path / "volume"
    make_volume(volume, entry.data, b"treasure")
    assert opens(volume, entry.data)
    assert opens(volume, given[DISK].removesuffix(b"\0"))
    # More than HMAC's block of 64 bytes, so that the NUL that GRUB wants makes it another passphrase.
    assert not opens(volume, given[DISK])
    assert not opens(volume, entry.data + b"\n")
    assert not opens(volume, (await Secrets().read(SPECS))[0].data.removesuffix(b"\0"))
