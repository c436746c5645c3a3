"""A monitoring system for tests: asks a metrics endpoint, and reads what it shows."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support.pki import Pair


@dataclass(frozen=True, kw_only=True)
class Page:
    """What was shown.

    Attributes:
        text: as it came.
    """

    text: str

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """All samples of a name, with their labels."""
        return [(sample.labels, sample.value) for sample in self._all() if sample.name == name]

    def of(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name that have these labels; 0 where there is none."""
        return sum(value for found, value in self.samples(name) if labels.items() <= found.items())

    def shows(self, name: str) -> bool:
        """Whether there is a sample of this name."""
        return bool(self.samples(name))

    def values(self, label: str) -> set[str]:
        """All values of a label, of whatever metric."""
        return {sample.labels[label] for sample in self._all() if label in sample.labels}

    def families(self) -> dict[str, str]:
        """Every name with its kind; a counter's as it is written."""
        found = text_string_to_metric_families(self.text)
        return {f"{each.name}_total" if each.type == "counter" else each.name: each.type for each in found}

    def _all(self) -> list[Sample]:
        return [sample for family in text_string_to_metric_families(self.text) for sample in family.samples]


async def fetch(
    address: str, *, method: str = "GET", target: str = "/metrics", tls: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """One request: its status and what came back."""

    def ask() -> tuple[int, str]:
        if tls is None:
            connection = http.client.HTTPConnection(address, timeout=30)
        else:
            connection = http.client.HTTPSConnection(address, timeout=30, context=tls)
        try:
            connection.request(method, target)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    return await asyncio.to_thread(ask)


async def scrape(address: str, tls: ssl.SSLContext | None = None) -> Page:
    """The page of an endpoint."""
    status, text = await fetch(address, tls=tls)
    assert status == 200, text
    return Page(text=text)


def silent(address: str, stack: ExitStack) -> socket.socket:
    """A connection that says nothing by itself."""
    host, _, port = address.rpartition(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=30))


def where(log: Path) -> str:
    """Where a service that logs there shows its metrics, as it said when it started last."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"metrics.listening"' in line]
    address: str = lines[-1]["address"]
    return address


def client_context(server_ca: Path, pair: Pair | None) -> ssl.SSLContext:
    """A client's side of TLS, with or without a certificate of its own."""
    context = ssl.create_default_context(cafile=server_ca)
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context
