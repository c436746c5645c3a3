"""A software platform as the host of the commands under test, and what they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.sev.certs.oca import encode_key, make_oca
from host_agent.devices import open_administration
from tests.support.platform import Platform, running_platform


@pytest.fixture(scope="session")
def _served_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running_platform(tmp_path_factory.mktemp("p"), key_service=True) as platform:
        yield platform


@pytest.fixture
def host(_served_host: Platform, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A platform as after a reset, named by the environment, with a cache of the test's own."""
    asyncio.run(_reset(_served_host))
    monkeypatch.setenv("SEVATTEST_DEVICE", str(_served_host.socket))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("no_proxy", "*")
    return _served_host


async def _reset(platform: Platform) -> None:
    device = open_administration(platform.socket, timeout=30)
    await device.factory_reset()
    await device.export_chain()  # initialises


@pytest.fixture
def owner(tmp_path: Path) -> tuple[Path, Path]:
    """An owner's certificate and key, as files."""
    certificate, key = make_oca()
    files = tmp_path / "oca.cert", tmp_path / "oca.key"
    files[0].write_bytes(certificate.raw)
    files[1].write_bytes(encode_key(key))
    return files
