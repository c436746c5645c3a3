"""The guests of one driver, by name, and where their firmware wants its secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from common.errors import InvalidInput, NotFound, Reason
from common.sev.digest.ovmf import TAIL_SIZE_MAX, Area, parse_footer


class Definition(Protocol):
    """What every guest's definition has, whichever driver it is for."""

    @property
    def driver(self) -> str:
        """The driver's name in the configuration."""
        ...

    @property
    def firmware(self) -> Path:
        """The guest's firmware image."""
        ...


_D = TypeVar("_D", bound=Definition)


class Guests(Generic[_D]):
    """The definitions; the part of `Hypervisor` that only reads them."""

    def __init__(self, guests: Mapping[str, _D]) -> None:
        self.guests = guests

    def define(self, guests: Mapping[str, _D]) -> None:
        """Take other definitions, for the machines that are started from now on."""
        self.guests = guests

    def definition(self, guest: str) -> _D:
        """The guest's definition.

        Raises:
            NotFound: no such guest.
        """
        if guest not in self.guests:
            raise NotFound(Reason.NOT_FOUND, "no such guest", guest=guest)
        return self.guests[guest]

    def driver(self, guest: str) -> str:
        """See `Hypervisor`."""
        return self.definition(guest).driver

    def secret_area(self, guest: str) -> Area | None:
        """See `Hypervisor`."""
        return read_secret_area(self.definition(guest).firmware)


def read_secret_area(firmware: Path) -> Area | None:
    """Where an image wants its secrets; None where it has no place for them.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the image cannot be read.
    """
    try:
        with firmware.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_SIZE_MAX))
            tail = file.read(TAIL_SIZE_MAX)
    except OSError as error:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, f"firmware {firmware} cannot be read: {error.strerror or error}"
        ) from error
    return parse_footer(tail).secret_area
