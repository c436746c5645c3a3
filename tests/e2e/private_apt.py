"""Debian packages without installing them: apt-get with lists, cache and state in a folder of its own, and no root.

Which mirrors there are and how they are reached is the machine's own configuration; nothing of it is written here. A
package of a newer suite comes from the same mirror.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

from common.errors import Reason, Unavailable

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_NEWER_SUITES = ("forky", "sid")
_PARTIAL = ("state/lists/partial", "cache/archives/partial")


class PrivateApt:
    """One set of package sources.

    Args:
        folder: an empty folder for everything that apt-get writes.
        sources: lines as in sources.list; the machine's own by default.

    Raises:
        Unavailable: this is no Debian or Ubuntu.
    """

    def __init__(self, folder: Path, sources: str | None = None) -> None:
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise _unavailable(f"{tool} is not there: parts of a guest come from Debian packages")
        self._folder = folder
        for name in _PARTIAL:
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        settings = {
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",  # nothing is installed, so that every dependency is named
            "Dir::Cache": folder / "cache",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Debug::NoLocking": "true",
        }
        if os.geteuid() == 0:
            settings["APT::Sandbox::User"] = "root"  # the folder is nobody else's
        if sources is not None:
            (folder / "sources.list").write_text(sources)
            settings["Dir::Etc::sourcelist"] = folder / "sources.list"
            settings["Dir::Etc::sourceparts"] = folder / "none"
        # A machine's hooks are about its own packages.
        hooks = "".join(
            f"#clear {name};\n" for name in ("APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
        )
        (folder / "apt.conf").write_text(hooks + "".join(f'{name} "{value}";\n' for name, value in settings.items()))
        self.complaint = ""

    def update(self) -> None:
        """Get the lists. What some source does not give is noted in `complaint`; the others are used."""
        done = self._run("apt-get", "-qq", "update")
        self.complaint = next((line for line in _lines(done.stderr) if line.startswith("Failed to fetch")), "")

    def newer(self, folder: Path) -> list[PrivateApt]:
        """The same mirror's newer suites, oldest first, not yet updated; none where the mirror is not Debian's."""
        return [apt for suite in _NEWER_SUITES if (apt := self._suite(folder, suite))]

    def backports(self, folder: Path) -> PrivateApt | None:
        """What the same mirror has for this release from newer ones, not yet updated; None where it is not Debian's."""
        return self._suite(folder, "{codename}-backports")

    def _suite(self, folder: Path, name: str) -> PrivateApt | None:
        fields = "$(LABEL) $(CODENAME) $(REPO_URI)"
        said = self._run("apt-get", "indextargets", "--format", fields, "Created-By: Packages").stdout
        rows = [line.split(" ") for line in said.splitlines()]
        found = next((row for row in rows if len(row) == 3 and row[0] == "Debian" and "-" not in row[1]), None)
        if found is None:
            return None
        _, codename, mirror = found
        signed = f" [signed-by={_KEYRING}]" if _KEYRING.is_file() else ""
        suite = name.format(codename=codename)
        (folder / suite).mkdir(parents=True)
        return PrivateApt(folder / suite, f"deb{signed} {mirror} {suite} main\n")

    def depends(self, package: str) -> list[str]:
        """The packages that one needs directly; empty where it is not known."""
        said = self._run("apt-cache", "depends", "--important", package).stdout
        return [line.split()[1] for line in said.splitlines() if line.strip().startswith("Depends:")]

    def closure(self, package: str) -> list[str]:
        """The package and everything that it needs; empty where it is not known."""
        said = self._run("apt-get", "-s", "--no-install-recommends", "install", package).stdout
        return [line.split()[1] for line in said.splitlines() if line.startswith("Inst ")]

    def unpack(self, packages: list[str], into: Path) -> dict[str, str]:
        """Get packages and unpack them into a folder; returns their versions.

        Raises:
            Unavailable: one cannot be had.
        """
        if not packages:
            raise _unavailable(f"cannot get {into.name}: {self.complaint or 'no package has that name'}")
        archives = self._folder / "debs" / into.name
        archives.mkdir(parents=True)
        done = self._run("apt-get", "-qq", "download", *packages, folder=archives)
        if done.returncode:
            # Without lists apt-get knows no package; what kept it from the lists says more.
            raise _unavailable(f"cannot get {', '.join(packages)}: {self.complaint or _last_line(done.stderr)}")
        versions = {}
        for archive in sorted(archives.iterdir()):
            name, version = archive.name.split("_")[:2]
            versions[name] = unquote(version)
            unpacked = subprocess.run(["dpkg-deb", "-x", archive, into], capture_output=True, text=True, check=False)
            if unpacked.returncode:
                raise _unavailable(f"cannot unpack {name}: {_last_line(unpacked.stderr)}")
            archive.unlink()
        return versions

    def _run(self, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        tool, *arguments = words
        return subprocess.run(
            [tool, "-c", str(self._folder / "apt.conf"), *arguments],
            cwd=folder or self._folder,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def _lines(said: str) -> list[str]:
    return [line.removeprefix("E: ").removeprefix("W: ").strip() for line in said.splitlines() if line.strip()]


def _last_line(said: str) -> str:
    return next(reversed(_lines(said)), "")


def _unavailable(message: str) -> Unavailable:
    return Unavailable(Reason.UNREACHABLE, message)
