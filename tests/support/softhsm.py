"""A PKCS#11 token of software, SoftHSM's, in a folder of its own: it can be pulled by moving the folder away."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from verifier.keys.token import Pkcs11Settings

PIN = "0471-1174"
SO_PIN = "9382-2839"
TOKEN = "owner"
KEY = "sevattest"
MODULES = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path("/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/lib64/pkcs11/libsofthsm2.so"),
)
MISSING = "SoftHSM is not installed (Debian package softhsm2)"


def softhsm_module() -> Path | None:
    """SoftHSM's library, where it is installed."""
    return next((path for path in MODULES if path.exists()), None)


@dataclass(frozen=True, kw_only=True)
class SoftToken:
    """One token.

    Attributes:
        folder: where everything of it is.
        settings: how to reach it.
    """

    folder: Path
    settings: Pkcs11Settings

    @property
    def environment(self) -> dict[str, str]:
        """What the library needs to find the token."""
        return {"SOFTHSM2_CONF": str(self.folder / "softhsm2.conf")}

    def tool(self, *words: str) -> None:
        """Run SoftHSM's own tool."""
        subprocess.run(
            ["softhsm2-util", *words], env=os.environ | self.environment, check=True, capture_output=True, timeout=30
        )

    def pull(self) -> None:
        """Take the token out."""
        (self.folder / "tokens").rename(self.folder / "pulled")
        (self.folder / "tokens").mkdir()

    def put_back(self) -> None:
        """Put the token in again."""
        (self.folder / "tokens").rmdir()
        (self.folder / "pulled").rename(self.folder / "tokens")

    def write_pin(self, pin: str) -> None:
        """Put another PIN into the PIN file."""
        fresh = self.settings.pin_file.with_suffix(".new")
        fresh.write_text(pin + "\n")
        fresh.chmod(0o600)
        fresh.replace(self.settings.pin_file)


def make_token(folder: Path, module: Path, *, keep: float = 60.0) -> SoftToken:
    """A new token in `folder`, without a key."""
    (folder / "tokens").mkdir(parents=True)
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    settings = Pkcs11Settings(module=module, token=TOKEN, key=KEY, pin_file=folder / "pin", keep=keep)
    token = SoftToken(folder=folder, settings=settings)
    token.write_pin(PIN)
    token.tool("--init-token", "--free", "--label", TOKEN, "--pin", PIN, "--so-pin", SO_PIN)
    return token
