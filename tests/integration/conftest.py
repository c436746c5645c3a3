"""What the integration tests share, and what they print at their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hammer.plan import HAMMERED
from tests.support.kill_table import rows
from tests.support.platform import Platform
from tests.support.postgres import own_postgres_server, postgres_schema, postgres_server
from tests.support.sev_host import Host, make_bootable_host

__all__ = ["own_postgres_server", "postgres_schema", "postgres_server"]


@pytest.fixture
def host(tmp_path: Path, platform: Platform) -> Host:
    """A host whose guest can be launched with a real QEMU."""
    return make_bootable_host(tmp_path, platform)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of kills and the counts of the hammer, where tests of them ran."""
    reports = terminalreporter.getreports("passed")
    properties = [each for report in reports for each in report.user_properties]
    hammered = [str(value) for name, value in properties if name == HAMMERED]
    if hammered:
        terminalreporter.section("a grant under the hammer")
        for told in hammered:
            terminalreporter.write_line(told)
    table = list(rows(properties))
    if table:
        terminalreporter.section("the guest after a kill -9 of the agent")
        for line in table:
            terminalreporter.write_line(line)
