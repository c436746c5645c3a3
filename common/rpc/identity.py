"""Who is calling: SPIFFE ids, the roles, and the caller of the RPC that is being served.

An identity is `spiffe://TRUST-DOMAIN/ROLE/NAME` (docs/identities.md). A role counts only together with its trust
domain: the datacenter's CA can mint `spiffe://datacenter…/owner/eve`, and that is nobody at the owner's listener.
"""

from __future__ import annotations

import re
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from enum import StrEnum

from common.errors import InvalidInput, Reason, Unauthenticated


class Role(StrEnum):
    """What a process is, as the second part of its SPIFFE id."""

    AGENT = "agent"
    ORCHESTRATOR = "orchestrator"
    VERIFIER = "verifier"
    OWNER = "owner"


# decisions.md 1: two sites, each with a trust domain and a CA of its own; and who answers calls, who makes them.
DATACENTER: frozenset[Role] = frozenset({Role.AGENT, Role.ORCHESTRATOR})
OWNER_SITE: frozenset[Role] = frozenset({Role.VERIFIER, Role.OWNER})
SERVERS: frozenset[Role] = frozenset({Role.AGENT, Role.VERIFIER})
CLIENTS: frozenset[Role] = frozenset({Role.ORCHESTRATOR, Role.OWNER})

# The SPIFFE ID standard, 2.1 and 2.2: lower-case trust domain of at most 255 characters; path segments of these.
_TRUST_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,253}[a-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEME = "spiffe://"


def check_trust_domain(text: str) -> str:
    """The trust domain that `text` spells.

    Raises:
        InvalidInput: `INVALID_ARGUMENT`; it is not lower-case letters, digits, dots, hyphens, underscores.
    """
    if not _TRUST_DOMAIN.fullmatch(text):
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{text!r} is not a trust domain")
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """One process, as its certificate names it.

    Attributes:
        trust_domain: whose CA vouches for it, for example `datacenter.example`.
        role: what it is.
        name: which one, 1 to 64 characters of `[A-Za-z0-9._-]`, the first a letter or digit.
        spiffe_id: `spiffe://TRUST-DOMAIN/ROLE/NAME`.
    """

    trust_domain: str
    role: Role
    name: str
    spiffe_id: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what no SPIFFE id can say (`InvalidInput`)."""
        check_trust_domain(self.trust_domain)
        if not _NAME.fullmatch(self.name):
            raise InvalidInput(Reason.INVALID_ARGUMENT, f"{self.name!r} is not a name for an identity")
        object.__setattr__(self, "spiffe_id", f"{_SCHEME}{self.trust_domain}/{self.role}/{self.name}")

    def __str__(self) -> str:
        return self.spiffe_id


def parse_spiffe_id(text: str) -> Identity:
    """The identity that `text` names; only the exact form, so that one identity has one spelling.

    Raises:
        Unauthenticated: it is not `spiffe://TRUST-DOMAIN/ROLE/NAME` with a role that we know.
    """
    parts = text.removeprefix(_SCHEME).split("/")
    if text.startswith(_SCHEME) and len(parts) == 3:
        with suppress(InvalidInput, ValueError):  # said below, as what it means here
            return Identity(trust_domain=parts[0], role=Role(parts[1]), name=parts[2])
    raise Unauthenticated(
        Reason.UNAUTHENTICATED, "the certificate's URI is not spiffe://TRUST-DOMAIN/ROLE/NAME with a known role"
    )


_caller: ContextVar[Identity] = ContextVar("caller")


def caller() -> Identity:
    """The caller of the RPC that is being served, as the gatekeeper established it.

    Raises:
        LookupError: no RPC is being served; a defect, never a peer's doing.
    """
    return _caller.get()


class ActingAs:
    """Serves the enclosed steps for one identity; tasks that start inside inherit it."""

    __slots__ = ("_identity", "_token")

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def __enter__(self) -> None:
        self._token: Token[Identity] = _caller.set(self._identity)

    def __exit__(self, *_: object) -> None:
        _caller.reset(self._token)
