"""Build hook: generates the package `sevattest.v1` from proto/ into common/gen (never edited, never committed)."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate(root: Path, out: Path) -> None:
    """Generate messages, stubs and their types for every .proto below root/proto into `out`.

    Raises:
        RuntimeError: protoc refused a file; its own message is on stderr.
    """
    import grpc_tools
    from grpc_tools import protoc

    # mypy-protobuf is a protoc plug-in: an executable beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    proto = root / "proto"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = sorted(str(path) for path in proto.rglob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{proto}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *files,
        ]
    )
    if status:
        raise RuntimeError(f"protoc ended with {status}")
    for folder in {path.parent for path in out.rglob("*.py")}:
        (folder / "__init__.py").touch()
    (out / "sevattest" / "__init__.py").touch()
    (out / "sevattest" / "py.typed").touch()


class GenerateProtos(BuildHookInterface[Any]):
    """Runs protoc before every wheel and every editable install."""

    PLUGIN_NAME = "generate-protos"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate into common/gen; both arguments are hatchling's and unused."""
        del version, build_data
        if self.target_name == "wheel":
            generate(Path(self.root), Path(self.root) / "common" / "gen")


if __name__ == "__main__":
    generate(Path(__file__).parent, Path(sys.argv[1]))
