"""A log that keeps what it is told, for tests that look at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line that would have been written."""

    level: str
    name: str
    fields: dict[str, Any]


@dataclass
class RecordingLog:
    """Takes the place of the services' log."""

    events: list[Event] = field(default_factory=list)

    def info(self, event: str, **fields: Any) -> None:
        """Keep an event."""
        self.events.append(Event(level="info", name=event, fields=fields))

    def warning(self, event: str, **fields: Any) -> None:
        """Keep an event."""
        self.events.append(Event(level="warning", name=event, fields=fields))

    def error(self, event: str, **fields: Any) -> None:
        """Keep an event."""
        self.events.append(Event(level="error", name=event, fields=fields))

    def named(self, name: str) -> list[Event]:
        """The events of this name."""
        return [event for event in self.events if event.name == name]
