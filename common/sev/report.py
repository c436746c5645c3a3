"""The attestation report: the launch digest and policy of a guest, signed by its platform's PEK.

Source: AMD document 55766, ATTESTATION (API 0.23 and later); formats.md section 11. Genuine is decided here;
acceptable (nonce, digest, policy, the PEK's own chain) is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from common.errors import InvalidInput, Reason
from common.sev.abi import REPORT_SIZE, SEV_SIGNATURE_SIZE, Algo, Usage
from common.sev.certs.sev import SevCertificate
from common.sev.errors import BadSignature, ParseError
from common.sev.policy import GuestPolicy

_SIGNED_SIZE = 0x34
_SIGNATURE_AT = 0x40
_NUMBER_FIELD = 72  # r and s each, little-endian
_NUMBER_SIZE = 48  # what P-384 fills of it


@dataclass(frozen=True, kw_only=True)
class AttestationReport:
    """A report, taken apart but not yet believed.

    Attributes:
        nonce: what the asker gave, 16 bytes.
        digest: the launch digest, 32 bytes.
        policy: the guest policy.
        raw: the report, 208 bytes.
    """

    nonce: bytes
    digest: bytes
    policy: GuestPolicy
    raw: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The fields of a report of 208 bytes.

        Raises:
            ParseError: it has another size, names another signer or algorithm than the PEK's, sets a reserved policy
                bit, or is not zero where zero is due.
        """
        if len(data) != REPORT_SIZE:
            raise ParseError(f"an attestation report has {REPORT_SIZE} bytes, not {len(data)}")
        data = bytes(data)
        policy, usage, algo, reserved = (int.from_bytes(data[at : at + 4], "little") for at in range(0x30, 0x40, 4))
        if usage != Usage.PEK or algo != Algo.ECDSA_SHA256:
            raise ParseError(
                f"an attestation report is signed by a PEK, not by usage 0x{usage:x}, algorithm 0x{algo:x}"
            )
        r, s = data[_SIGNATURE_AT : _SIGNATURE_AT + _NUMBER_FIELD], data[_SIGNATURE_AT + _NUMBER_FIELD :]
        if reserved or any(r[_NUMBER_SIZE:]) or any(s[_NUMBER_SIZE:]):
            raise ParseError("the attestation report is not zero where zero is due")
        return cls(nonce=data[:0x10], digest=data[0x10:0x30], policy=GuestPolicy.parse(policy), raw=data)

    def verify(self, pek: SevCertificate) -> None:
        """Check the signature. The caller MUST have verified the PEK's own chain.

        Raises:
            BadSignature: this PEK did not sign this report.
            InvalidInput: the certificate is no PEK.
        """
        if pek.usage is not Usage.PEK:
            raise InvalidInput(Reason.INVALID_ARGUMENT, "the certificate to verify a report with is no PEK")
        try:
            # The same form as in a certificate's slot, without its padding.
            pek.check(self.raw[:_SIGNED_SIZE], self.raw[_SIGNATURE_AT:].ljust(SEV_SIGNATURE_SIZE, b"\0"))
        except BadSignature as error:
            raise BadSignature("this PEK did not sign the attestation report") from error
