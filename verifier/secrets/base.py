"""What the broker asks of secrets, and what asks a single source; `verifier.secrets.router` is between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar

from common.errors import Reason, Unavailable
from common.sev.secret import SecretEntry
from verifier.documents.workload import SecretSpec

S_contra = TypeVar("S_contra", contravariant=True)


class SecretSource(Protocol):
    """Reads the secrets of one launch, all of them or none."""

    async def sizes(self, specs: Sequence[SecretSpec]) -> tuple[int, ...]:
        """How many bytes each secret has now, in order; nothing that was read for it is kept.

        Raises:
            Unavailable: a source has no answer (SECRET_UNAVAILABLE, STORE_UNAVAILABLE, KEY_UNAVAILABLE). It says no
                more than a host may know; of SECRET_UNAVAILABLE the cause says why, to the owner.
        """
        ...

    async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
        """The table entries, in order. A generated secret is new with each call.

        Raises:
            Unavailable: a source has no answer (SECRET_UNAVAILABLE, STORE_UNAVAILABLE, KEY_UNAVAILABLE).
        """
        ...


class Asked(Protocol[S_contra]):
    """Knows the secrets of one kind of source.

    A secret has at least one byte. Of one that is larger than any packet only the beginning need be given, as long as
    that is too large, too.

    Attributes:
        waits: whether an answer may take time.
    """

    waits: ClassVar[bool]

    async def size(self, source: S_contra) -> int:
        """How many bytes the secret has now.

        Raises:
            Unavailable: SECRET_UNAVAILABLE, with a sentence for the owner's log; or what the store or the key raises.
        """
        ...

    async def read(self, source: S_contra) -> bytes:
        """The secret, without a NUL that its table entry may get.

        Raises:
            Unavailable: as for `size`.
        """
        ...


def no_answer(why: str) -> Unavailable:
    """The error of a source that cannot say its secret; `why` is for the owner's log and goes to no host."""
    return Unavailable(Reason.SECRET_UNAVAILABLE, why)
