"""What the pure SEV code raises, as leaves of the one tree in `common.errors`."""

from __future__ import annotations

from common.errors import InvalidInput, Reason, Refused


class ParseError(InvalidInput):
    """Bytes from outside are not the structure that they should be. The only thing a parser raises."""

    def __init__(self, message: str, **fields: str) -> None:
        super().__init__(Reason.MALFORMED, message, **fields)


class BadSignature(Refused):
    """A signature or MAC over a certificate or report does not verify."""

    def __init__(self, message: str, **fields: str) -> None:
        super().__init__(Reason.BAD_SIGNATURE, message, **fields)


class UntrustedRoot(Refused):
    """The chain is consistent in itself or not, but does not lead to a pinned root."""

    def __init__(self, message: str, **fields: str) -> None:
        super().__init__(Reason.UNTRUSTED_ROOT, message, **fields)


class UnsignedCek(Refused):
    """The CEK carries no signature: it must be completed from AMD's key service first."""

    def __init__(self, message: str, **fields: str) -> None:
        super().__init__(Reason.CEK_UNSIGNED, message, **fields)
