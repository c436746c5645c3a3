"""Probes that meet what they did not expect: a folder that may not be searched, a file that goes away, no answer."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from common.errors import Reason, Unavailable
from host_agent.doctor import firmware, foreign, guests, kernel, processor, qemu, site
from host_agent.doctor.examination import Question, examine
from host_agent.doctor.findings import Finding, Outcome
from host_agent.doctor.machine import Unreadable
from tests.support.agent_site import Site, agent_site
from tests.support.hosts import host, outcomes
from tests.support.pki import Pki
from tests.support.platform import Platform

NOBODY = 65534


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def configured(tmp_path: Path, pki: Pki) -> Iterator[Site]:
    """A configuration for a software platform that is not there."""
    with agent_site(Platform(state=tmp_path / "p", generation="milan"), pki) as made:
        made.write_config()
        yield made


def look(config: Path | None) -> list[Finding]:
    question = Question(
        machine=host("rome-sev-es"),
        config_file=config,
        environ={},
        captured=False,
        es=True,
        key_service=None,
        roots=(),
    )
    return asyncio.run(examine(question))


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user without rights, where this is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_above_state_dir_that_may_not_be_searched_is_a_finding(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "state").mkdir(parents=True)
    closed.chmod(0)
    try:
        with as_nobody():
            found = outcomes([*site.state_dir(host("rome-sev-es"), closed / "state")])
    finally:
        closed.chmod(0o700)
    assert found == {"state_dir.private": "FAIL", "state_dir.local": "SKIP"}


TROUBLE: list[Exception] = [
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere"),
    OSError("no errno"),
    Unreadable("it cannot be read"),
    Unavailable(Reason.PLATFORM_UNAVAILABLE, "nobody answers"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
]


def raising(error: Exception) -> Callable[..., Iterator[Finding]]:
    def look_at(*_args: object, **_keywords: object) -> Iterator[Finding]:
        raise error
        yield  # a generator, as all probes are

    return look_at


def raising_answers(error: Exception) -> Callable[..., Any]:
    async def look_at(*_args: object, **_keywords: object) -> Any:
        raise error
        yield

    return look_at


@pytest.mark.parametrize("error", TROUBLE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "place",
    [
        (site, "state_dir", "state_dir"),
        (qemu, "probe", "qemu.web"),
        (guests, "probe", "guest.web"),
        (firmware, "probe", "firmware"),
        (foreign, "probe", "guest"),
    ],
)
def test_trouble_in_a_group_of_probes_ends_that_group_alone(
    configured: Site, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str, str], error: Exception
) -> None:
    module, name, group = place
    before = outcomes(look(configured.config))
    fault = raising_answers(error) if module in {firmware, foreign} else raising(error)
    monkeypatch.setattr(module, name, fault)
    findings = look(configured.config)
    found = outcomes(findings)
    assert found[group] == "SKIP"
    assert {probe for probe in before if probe.partition(".")[0] != group.partition(".")[0]} <= set(found)
    (told,) = [finding for finding in findings if finding.probe == group]
    assert "\n" not in told.seen
    assert "None" not in told.seen


@pytest.mark.parametrize(
    ("driver", "words"),
    [("socket", "sevattest platform serve"), ("qmp", "docs/hypervisors.md"), ("dev_sev", "dmesg")],
)
def test_what_to_do_about_a_platform_that_does_not_answer_is_about_the_configured_device(
    configured: Site, driver: str, words: str
) -> None:
    text = configured.config.read_text()
    assert 'driver = "socket"' in text
    configured.config.write_text(text.replace('driver = "socket"', f'driver = "{driver}"'))
    (told,) = [finding for finding in look(configured.config) if finding.probe == "firmware.answers"]
    assert told.outcome is Outcome.FAIL
    assert words in told.advice


@pytest.mark.parametrize(("module", "group"), [(processor, "cpu"), (kernel, "kernel")])
def test_trouble_with_the_hardware_is_a_finding_too(monkeypatch: pytest.MonkeyPatch, module: Any, group: str) -> None:
    monkeypatch.setattr(module, "probe", raising(TROUBLE[0]))
    assert outcomes(look(None))[group] == "SKIP"


def test_a_configuration_that_cannot_be_looked_at_is_a_finding(
    configured: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: object) -> NoReturn:
        raise TROUBLE[0]

    monkeypatch.setattr("host_agent.config.load", load)
    (told,) = [finding for finding in look(configured.config) if finding.probe == "agent.config"]
    assert (str(told.outcome), told.seen) == ("FAIL", "/somewhere: Permission denied")
