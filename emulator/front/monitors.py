"""The machine's control monitors: each is a channel for clients and a door to the same monitor of the real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Self

from emulator.errors import MachineDied
from emulator.front.channel_spec import ChannelSpec
from emulator.front.channels import Channel, Client
from emulator.front.real_qemu import Door
from emulator.front.relay import Relay, SevSide
from emulator.qemu_words import complain

_LAST_WORDS = 2.0  # seconds for clients to take what a machine that ended said last


class Monitors:
    """All of them; as a context manager they are open within."""

    def __init__(self, specs: Sequence[ChannelSpec], doors: Sequence[Door], sev: SevSide) -> None:
        self._specs = specs
        self._doors = doors
        self._sev = sev
        self._channels: list[Channel] = []
        self._serving: list[asyncio.Task[None]] = []
        self._conversations: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Open every channel.

        Raises:
            MachineDied: one cannot be opened; with QEMU's words.
        """
        try:
            for spec, door in zip(self._specs, self._doors, strict=True):
                channel = Channel(spec)
                self._channels.append(channel)
                self._serving.append(asyncio.create_task(self._serve(channel, door)))
        except MachineDied:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let clients hear the machine's last words, then close."""
        if self._conversations:
            await asyncio.wait(self._conversations, timeout=_LAST_WORDS)
        await self._close()

    async def wait_for_clients(self) -> None:
        """Return when every channel that was to wait for its first client has it."""
        for channel in self._channels:
            if channel.spec.wait:
                await channel.reached.wait()

    async def _serve(self, channel: Channel, door: Door) -> None:
        async with contextlib.aclosing(channel.clients()) as clients:
            async for client in clients:
                conversation = asyncio.create_task(self._converse(channel, door, client))
                self._conversations.add(conversation)
                try:
                    await conversation
                finally:
                    self._conversations.discard(conversation)

    async def _converse(self, channel: Channel, door: Door, client: Client) -> None:
        try:
            machine = Client(*await door.connect())
            await Relay(self._sev, client, machine, pretty=channel.spec.pretty).run()
        except ConnectionError:
            pass  # the machine has ended
        except Exception as error:  # noqa: BLE001 -- a defect must not take the monitor away from the next client
            complain(f"the front of QEMU failed in a conversation: {error!r}")

    async def _close(self) -> None:
        tasks = [*self._serving, *self._conversations]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels:
            channel.close()
