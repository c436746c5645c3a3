"""What the integration tests share, and what they print at their end."""

from __future__ import annotations

import pytest

from tests.support.kill_table import rows
from tests.support.postgres import own_postgres_server, postgres_server

__all__ = ["own_postgres_server", "postgres_server"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of kills, where tests of it ran."""
    reports = terminalreporter.getreports("passed")
    table = list(rows(each for report in reports for each in report.user_properties))
    if table:
        terminalreporter.section("the guest after a kill -9 of the agent")
        for line in table:
            terminalreporter.write_line(line)
