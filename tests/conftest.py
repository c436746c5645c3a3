"""How many tests run at once, and what many of them need: a software platform, identities, an agent's site."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.agent_site import Site, agent_site
from tests.support.pki import Pki
from tests.support.platform import Platform, keep_chips, running_platform

# How long an example takes says how busy the machine is, and nothing about what is tested.
settings.register_profile("sevattest", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sevattest")


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: more workers than processors, since a test waits for other programs half of its time."""
    return (len(os.sched_getaffinity(0)) * 3 + 1) // 2


@pytest.fixture(scope="session", autouse=True)
def _one_chip_for_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Share the software platforms' keys among all tests and workers of a run."""
    own = tmp_path_factory.getbasetemp()
    keep_chips((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "chips")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A software platform of the module's own, served by a process."""
    with running_platform(tmp_path_factory.mktemp("p")) as running:
        yield running


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Both sides' certificate authorities, and who has a certificate of theirs."""
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def site(platform: Platform, pki: Pki) -> Iterator[Site]:
    """An agent's configuration and its guest's files; no process and no file of it is left."""
    with agent_site(platform, pki) as made:
        made.write_config()
        yield made
