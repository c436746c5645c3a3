"""Composition root of `sevattest platform serve` and `show`: a state folder becomes a platform.

Nothing else in this package picks implementations or knows the folder's layout.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emulator.device_client import Device
from emulator.device_server import DeviceServer
from emulator.driver import Driver, describe
from emulator.errors import StateFolderUnusable
from emulator.faults import Faults
from emulator.identity import IdentityFile
from emulator.key_service import KeyService
from emulator.keys import DEFAULT_GENERATION, GENERATIONS, Chip, make_chip, publish
from emulator.protocol import GuestRequest
from emulator.psp import Psp
from emulator.state_folder import StateFolder

_SOCKET_PATH_MAX = 107  # sun_path of linux/un.h without its NUL


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a platform is served.

    Attributes:
        state: the platform's folder.
        generation: which generation a new folder becomes; must be the folder's own when it exists. None: do not care.
        kds_listen: host and port of the key service; None for none.
        kds_resign: whether the key service signs the CEK anew for each answer.
        initialise: whether the platform is in INIT from the start, as with the kernel's `psp_init_on_probe`.
        es: whether SEV-ES is enabled.
        trace: whether each command is told on stderr.
    """

    state: Path
    generation: str | None = None
    kds_listen: tuple[str, int] | None = None
    kds_resign: bool = False
    initialise: bool = True
    es: bool = True
    trace: bool = False


def open_platform(folder: StateFolder, options: ServeOptions) -> Psp:
    """The platform in `folder`, made when there is none; the folder must be locked.

    Raises:
        StateFolderUnusable: the folder is of another generation or is not a platform's.
    """
    if folder.chip.is_dir():
        chip = Chip.load(folder.chip)
        if options.generation not in {None, chip.generation.name}:
            raise StateFolderUnusable(
                f"the platform in {folder.path} is {chip.generation.name}, not {options.generation}"
            )
    else:
        chip = make_chip(folder.chip, GENERATIONS[options.generation or DEFAULT_GENERATION])
    publish(chip, ask_ark=folder.ask_ark, kds=folder.kds)
    return Psp(chip, IdentityFile(folder.identity), es=options.es)


async def serve(
    options: ServeOptions,
    *,
    faults: Faults | None = None,
    stop: asyncio.Event | None = None,
    ready: Callable[[], object] | None = None,
) -> None:
    """Serve a platform until it is told to stop.

    Args:
        options: what to serve.
        faults: failures to come; for tests in this process.
        stop: ends it; without one SIGTERM and SIGINT do.
        ready: called when it serves, instead of saying so on stdout.

    Raises:
        StateFolderUnusable: see `open_platform`; or the folder is served by another process.
    """
    folder = StateFolder(options.state)
    if len(os.fsencode(folder.socket)) > _SOCKET_PATH_MAX:
        raise StateFolderUnusable(f"{folder.socket} is longer than a socket's path may be ({_SOCKET_PATH_MAX} bytes)")
    folder.make()
    folder.lock()
    try:
        folder.sweep()
        stopped = stop or _stopped_by_signal()
        psp = open_platform(folder, options)
        driver = Driver(psp)
        if options.initialise:
            driver.init()
        server = DeviceServer(driver, folder.socket, faults=faults, trace=sys.stderr if options.trace else None)
        keys = KeyService(folder.kds, resign=psp.chip if options.kds_resign else None)
        await server.start()
        try:
            url = await keys.start(*options.kds_listen) if options.kds_listen else None
            if ready is not None:
                ready()
            else:
                _say(f"sevattest platform: serving on {folder.socket}")
                if url:
                    _say(f"sevattest platform: key service on {url}")
            await stopped.wait()
        finally:
            await keys.stop()
            await server.stop()
    finally:
        folder.unlock()


def look(state: Path) -> dict[str, object]:
    """What a platform says about itself: the served one's own words, else what its folder holds.

    Raises:
        StateFolderUnusable: there is no platform in this folder.
    """
    folder = StateFolder(state)
    if not folder.chip.is_dir():
        raise StateFolderUnusable(f"there is no platform in {state}")
    try:
        with Device(folder.socket, writable=False) as device:
            told: dict[str, object] = json.loads(device.issue(GuestRequest.DESCRIBE))
            return told | {"served": True}
    except (FileNotFoundError, ConnectionError):
        return describe(Psp(Chip.load(folder.chip), IdentityFile(folder.identity))) | {"served": False}


def _stopped_by_signal() -> asyncio.Event:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 -- what whoever started the program waits for
