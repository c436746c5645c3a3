"""CPU models by QEMU's names: what ends up in a save area and in `query-cpu-model-expansion`.

Source: QEMU, target/i386/cpu.c (builtin_x86_defs). A model's versions share family, model and stepping.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CpuModel:
    """One model: CPUID family, model, stepping, and the name that the guest sees."""

    name: str
    family: int
    model: int
    stepping: int
    model_id: str
    level: int = 0xD


_MODELS = {
    row.name: row
    for row in (
        CpuModel(name="EPYC", family=23, model=1, stepping=2, model_id="AMD EPYC Processor"),
        CpuModel(name="EPYC-IBPB", family=23, model=1, stepping=2, model_id="AMD EPYC Processor (with IBPB)"),
        CpuModel(name="EPYC-Rome", family=23, model=49, stepping=0, model_id="AMD EPYC-Rome Processor"),
        CpuModel(name="EPYC-Milan", family=25, model=1, stepping=1, model_id="AMD EPYC-Milan Processor"),
        CpuModel(name="EPYC-Genoa", family=25, model=17, stepping=0, model_id="AMD EPYC-Genoa Processor"),
        CpuModel(name="EPYC-Turin", family=26, model=0, stepping=0, model_id="AMD EPYC-Turin Processor"),
        CpuModel(name="qemu64", family=15, model=107, stepping=1, model_id="QEMU Virtual CPU version 2.5+"),
        CpuModel(name="max", family=6, model=6, stepping=3, model_id="QEMU TCG CPU version 2.5+"),
    )
}
# What `-cpu host` is on a platform of each generation.
_HOSTS = {
    "naples": "EPYC",
    "rome": "EPYC-Rome",
    "milan": "EPYC-Milan",
    "genoa": "EPYC-Genoa",
    "turin": "EPYC-Turin",
}
_VERSION = re.compile(r"-v[1-9][0-9]?$")
DEFAULT_MODEL = "qemu64"


def find_model(name: str, *, generation: str) -> CpuModel | None:
    """The model of this name, with or without its version; None if there is none."""
    if name == "host":
        return _MODELS[host_model(generation)]
    return _MODELS.get(_VERSION.sub("", name))


def host_model(generation: str) -> str:
    """The name of the model that `-cpu host` is on a platform of this generation."""
    return _HOSTS[generation]
