"""No secret, TEK, TIK, GODH key or KEK in any file, log line, audit record or error: raw, hex, base64 or reversed."""

from __future__ import annotations

import io
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import SevattestError
from common.telemetry.log import configure
from tests.support.desk import KEK, Desk, Guest, desk
from tests.support.documents import SECRET
from tests.support.documents import workload as document
from tests.support.spellings import leaks, planted, spellings


@pytest.fixture
def godh_keys(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The private numbers of every P-384 key that is made, the launches' GODHs among them."""
    seen: list[bytes] = []
    real = ec.generate_private_key

    def watched(curve: ec.EllipticCurve, *_: Any) -> ec.EllipticCurvePrivateKey:
        key = real(curve)
        seen.append(key.private_numbers().private_value.to_bytes(48, "big"))
        return key

    monkeypatch.setattr(ec, "generate_private_key", watched)
    return seen


def scan(d: Desk, secrets: dict[str, bytes], log: io.StringIO, errors: list[str]) -> list[str]:
    """Where any of the secrets shows."""
    places = {path.name: path.read_bytes() for path in (d.folder / "state").iterdir()}
    places["log"] = log.getvalue().encode()
    places["errors"] = "\n".join(errors).encode()
    assert sum(map(len, places.values())) > 50_000
    return leaks(secrets, places)


def test_the_scan_finds_what_it_looks_for() -> None:
    secret = bytes(range(100, 116))
    for spelling in spellings(secret):
        assert len(spelling) >= 15
    for how, text in planted(secret):
        place = b"x" * 1000 + text + b"x" * 1000
        assert leaks({"secret": secret}, {"place": place}) == ["secret in place"], how
    assert leaks({"secret": secret}, {"place": secret[:-1] + secret[1:]}) == []


async def test_nothing_secret_is_written_before_or_after_release(tmp_path: Path, godh_keys: list[bytes]) -> None:
    log = io.StringIO()
    errors: list[str] = []
    write_log = configure("test", log)
    contents = [document(), {**document(secrets=None), "metadata": {"name": "attested", "version": "1"}}]
    async with desk(tmp_path, content=contents, write_log=write_log) as d:
        secrets = {"secret": SECRET, "KEK": KEK}
        guests: list[tuple[Any, Guest]] = []
        for number in range(8):
            begun = await d.begin(workload="attested" if number == 1 else "web")
            guest = d.start(begun)
            secrets |= {f"TEK {number}": guest.channel.tek, f"TIK {number}": guest.channel.tik}
            guests.append((begun.launch.launch_id, guest))
        secrets |= {f"GODH {number}": key for number, key in enumerate(godh_keys)}
        assert len(godh_keys) >= 8
        assert scan(d, secrets, log, errors) == []

        good, attested, wrong, abandoned, expired = guests[:5]
        digest = (await d.digests())[0]
        await d.release(good[0], good[1].measure(digest))
        blob = attested[1].measure(digest)
        released = await d.release(attested[0], blob)
        (entry,) = attested[1].open(released, blob)
        secrets["attested"] = entry.data
        for launch_id, measurement in ((wrong[0], bytes(48)), (good[0], bytes(48))):
            with pytest.raises(SevattestError) as caught:
                await d.release(launch_id, measurement)
            errors.append(f"{caught.value!r} {caught.value.fields}")
        await d.abandon(abandoned[0])
        (d.documents / "secret").write_bytes(SECRET + bytes(4000))
        with pytest.raises(SevattestError) as caught:
            await d.release(guests[5][0], guests[5][1].measure(digest))
        errors.append(f"{caught.value!r} {caught.value.fields}")
        assert scan(d, secrets, log, errors) == []
        d.clock.advance(timedelta(minutes=11))
        await d.broker.expire_overdue()
        await d.store.flush_erased()
        assert await d.keys_of(expired[0]) is None
        assert scan(d, secrets, log, errors) == []
    assert "launch.released" in log.getvalue()


async def test_values_on_the_way_do_not_show_their_secrets(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        guest = d.start(begun)
        row = await d.store.launch(begun.launch.launch_id)
        released = await d.release(begun.launch.launch_id, guest.measure((await d.digests())[0]))
        for value in (begun, row, released, d.dependencies.sealing):
            text = repr(value).encode()
            for secret in (guest.channel.tek, guest.channel.tik, KEK, SECRET):
                assert repr(secret).encode()[2:-1] not in text
        assert row is not None
        assert row.keys is not None
        assert repr(row.keys.tek) not in repr(row)
