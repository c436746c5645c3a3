"""SPIFFE ids: one spelling for each identity, and nothing else is one."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput, Unauthenticated
from common.rpc.identity import (
    CLIENTS,
    DATACENTER,
    OWNER_SITE,
    SERVERS,
    ActingAs,
    Identity,
    Role,
    caller,
    parse_spiffe_id,
)


@pytest.mark.parametrize("role", Role)
def test_an_identity_is_read_back_from_its_spiffe_id(role: Role) -> None:
    identity = Identity(trust_domain="datacenter.example", role=role, name="host-1.rack_2")
    assert identity.spiffe_id == f"spiffe://datacenter.example/{role}/host-1.rack_2"
    assert parse_spiffe_id(identity.spiffe_id) == identity


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe://datacenter.example",
        "spiffe://datacenter.example/agent",
        "spiffe://datacenter.example/agent/",
        "spiffe://datacenter.example/agent/x/",
        "spiffe://datacenter.example/agent/x/y",
        "spiffe://datacenter.example//x",
        "spiffe:///agent/x",
        "spiffe://datacenter.example/AGENT/x",
        "spiffe://datacenter.example/admin/x",
        "spiffe://Datacenter.example/agent/x",
        "spiffe://datacenter.example:443/agent/x",
        "spiffe://user@datacenter.example/agent/x",
        "spiffe://datacenter.example/agent/x?y",
        "spiffe://datacenter.example/agent/x#y",
        "spiffe://datacenter.example/agent/%78",
        "spiffe://datacenter.example/agent/..",
        "spiffe://datacenter.example/agent/x\n",
        "spiffe://datacenter.example\n/agent/x",
        "spiffe://datacenter.example/agent/" + "x" * 65,
        "spiffe://" + "d" * 256 + "/agent/x",
        "SPIFFE://datacenter.example/agent/x",
        "https://datacenter.example/agent/x",
        " spiffe://datacenter.example/agent/x",
    ],
)
def test_what_is_not_exactly_a_spiffe_id_is_no_identity(text: str) -> None:
    with pytest.raises(Unauthenticated):
        parse_spiffe_id(text)


@given(st.text())
def test_any_text_is_an_identity_that_spells_itself_or_none(text: str) -> None:
    with suppress(Unauthenticated):
        assert parse_spiffe_id(text).spiffe_id == text


@pytest.mark.parametrize(
    ("domain", "name"), [("", "x"), ("Upper.example", "x"), ("a.example", ""), ("a.example", "-x")]
)
def test_an_identity_that_cannot_be_spelled_cannot_be_made(domain: str, name: str) -> None:
    with pytest.raises(InvalidInput):
        Identity(trust_domain=domain, role=Role.AGENT, name=name)


def test_each_role_is_of_one_site_and_calls_or_is_called() -> None:
    assert set(Role) == DATACENTER | OWNER_SITE == SERVERS | CLIENTS
    assert not DATACENTER & OWNER_SITE
    assert not SERVERS & CLIENTS


def test_outside_of_a_call_there_is_no_caller() -> None:
    with pytest.raises(LookupError):
        caller()


async def test_a_task_that_a_call_starts_has_the_calls_caller() -> None:
    who = Identity(trust_domain="datacenter.example", role=Role.ORCHESTRATOR, name="one")

    async def ask() -> Identity:
        return caller()

    with ActingAs(who):
        task = asyncio.create_task(ask())
    assert await task == who
    with pytest.raises(LookupError):
        caller()
