"""The QMP commands of the stand-in machine: their parameters as QEMU's schema has them, and what they answer.

Source: QEMU's qapi/*.json (argument types and errors), real transcripts (order of members, words). `dispatch` is the
whole way from a parsed value to the reply; no socket and no JSON here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from emulator.capabilities import read_capabilities
from emulator.cpu_models import find_model
from emulator.errors import CommandError
from emulator.machine import Machine, RunState
from emulator.qemu_words import complain
from emulator.sev_launch import query_sev

_GENERIC = "GenericError"
_NOT_FOUND = "CommandNotFound"
# QEMU version -> what `query-version` and the greeting say.
VERSIONS: Mapping[str, tuple[int, int, int]] = {"7.2": (7, 2, 22), "10.0": (10, 0, 2)}
_PACKAGE = "sevattest stand-in"


class QmpError(Exception):
    """An error reply: QEMU's class and words."""

    def __init__(self, desc: str, kind: str = _GENERIC) -> None:
        super().__init__(desc)
        self.desc = desc
        self.kind = kind


class _Type(Enum):
    STR = auto()
    UINT64 = auto()
    OBJECT = auto()
    LIST = auto()
    EXPANSION = auto()


_EXPANSIONS = ("static", "full")
# command -> its parameters in schema order: name -> (type, required)
_Parameters = Mapping[str, tuple[_Type, bool]]
_SCHEMA: Mapping[str, _Parameters] = {
    "qmp_capabilities": {"enable": (_Type.LIST, False)},
    "cont": {},
    "query-commands": {},
    "query-cpu-model-expansion": {"type": (_Type.EXPANSION, True), "model": (_Type.OBJECT, True)},
    "query-cpus-fast": {},
    "query-kvm": {},
    "query-sev": {},
    "query-sev-attestation-report": {"mnonce": (_Type.STR, True)},
    "query-sev-capabilities": {},
    "query-sev-launch-measure": {},
    "query-status": {},
    "query-version": {},
    "quit": {},
    "sev-inject-launch-secret": {
        "packet-header": (_Type.STR, True),
        "secret": (_Type.STR, True),
        "gpa": (_Type.UINT64, False),
    },
    "stop": {},
    "system_reset": {},
}


@dataclass
class Session:
    """One client's standing: which commands it may give."""

    negotiated: bool = False
    oob: bool = False


class Commands:
    """The machine's monitor, apart from the socket."""

    def __init__(self, machine: Machine, version: str, power_off: Callable[[], None]) -> None:
        self._machine = machine
        self._version = VERSIONS[version]
        self._power_off = power_off
        self._handlers: dict[str, Callable[[dict[str, Any]], object]] = {
            "cont": self._cont,
            "query-commands": self._query_commands,
            "query-cpu-model-expansion": self._query_cpu_model_expansion,
            "query-cpus-fast": self._query_cpus_fast,
            "query-kvm": lambda _: {"enabled": True, "present": True},
            "query-sev": self._query_sev,
            "query-sev-attestation-report": self._query_sev_attestation_report,
            "query-sev-capabilities": self._query_sev_capabilities,
            "query-sev-launch-measure": self._query_sev_launch_measure,
            "query-status": self._query_status,
            "query-version": lambda _: self._about(),
            "quit": self._quit,
            "sev-inject-launch-secret": self._sev_inject_launch_secret,
            "stop": self._stop,
            "system_reset": self._system_reset,
        }

    def greeting(self) -> dict[str, object]:
        """What a client hears first."""
        return {"QMP": {"version": self._about(), "capabilities": ["oob"]}}

    def dispatch(self, session: Session, request: object) -> dict[str, object]:
        """The reply to one parsed request; members in QEMU's order."""
        identity = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        try:
            name, arguments = _check_request(session, request)
            return {"return": self._run(session, name, arguments)} | identity
        except QmpError as error:
            return identity | {"error": {"class": error.kind, "desc": error.desc}}

    def _run(self, session: Session, name: str, arguments: dict[str, Any]) -> object:
        if not session.negotiated:
            if name != "qmp_capabilities":
                raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", _NOT_FOUND)
            _check_arguments(_SCHEMA[name], arguments)
            return _negotiate(session, arguments.get("enable", []))
        if name == "qmp_capabilities":
            raise QmpError("Capabilities negotiation is already complete, command ignored", _NOT_FOUND)
        if name not in self._handlers:
            raise QmpError(f"The command {name} has not been found", _NOT_FOUND)
        _check_arguments(_SCHEMA[name], arguments)
        try:
            return self._handlers[name](arguments)
        except CommandError as error:
            raise QmpError(str(error)) from error

    def _about(self) -> dict[str, object]:
        major, minor, micro = self._version
        return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": _PACKAGE}

    def _query_commands(self, _: dict[str, Any]) -> object:
        return [{"name": name} for name in _SCHEMA]

    def _query_status(self, _: dict[str, Any]) -> object:
        state = self._machine.run_state
        answer: dict[str, object] = {"status": state.value}
        if self._version[0] < 9:
            answer["singlestep"] = False
        return answer | {"running": state is RunState.RUNNING}

    def _query_sev(self, _: dict[str, Any]) -> object:
        return query_sev(self._machine.sev, self._version[:2])

    def _query_sev_capabilities(self, _: dict[str, Any]) -> object:
        return read_capabilities(self._machine.platform, cbitpos=self._machine.processor.cbitpos)

    def _query_sev_launch_measure(self, _: dict[str, Any]) -> object:
        blob = self._machine.sev.measurement if self._machine.sev else None
        if blob is None:
            raise QmpError("SEV launch measurement is not available")
        return {"data": blob}

    def _sev_inject_launch_secret(self, arguments: dict[str, Any]) -> object:
        self._machine.inject(
            header=arguments["packet-header"], secret=arguments["secret"], address=arguments.get("gpa")
        )
        return {}

    def _query_sev_attestation_report(self, arguments: dict[str, Any]) -> object:
        return {"data": self._machine.report(arguments["mnonce"])}

    def _query_cpu_model_expansion(self, arguments: dict[str, Any]) -> object:
        wanted = arguments["model"]
        if "name" not in wanted:
            raise QmpError("Parameter 'model.name' is missing")
        if not isinstance(wanted["name"], str):
            raise QmpError("Invalid parameter type for 'model.name', expected: string")
        for member in wanted:
            if member not in {"name", "props"}:
                raise QmpError(f"Parameter 'model.{member}' is unexpected")
        model = find_model(wanted["name"], generation=self._machine.processor.generation)
        if model is None:
            raise QmpError(f"CPU model '{wanted['name']}' not found")
        props: dict[str, object] = {
            "family": model.family,
            "min-level": model.level,
            "vendor": "AuthenticAMD",
            "model": model.model,
            "stepping": model.stepping,
            "model-id": model.model_id,
        }
        given = wanted.get("props", {})
        if not isinstance(given, dict):
            raise QmpError("Invalid parameter type for 'model.props', expected: object")
        props |= given
        if arguments["type"] == "static":
            return {"model": {"name": "base", "props": props}}
        return {"model": {"name": wanted["name"], "props": props | {"level": model.level}}}

    def _query_cpus_fast(self, _: dict[str, Any]) -> object:
        return [
            {
                "thread-id": 0,  # the stand-in has no vCPU threads
                "props": {"core-id": number, "thread-id": 0, "socket-id": 0},
                "qom-path": f"/machine/unattached/device[{number}]",
                "cpu-index": number,
                "target": "x86_64",
            }
            for number in range(self._machine.options.vcpus)
        ]

    def _cont(self, _: dict[str, Any]) -> object:
        self._machine.cont()
        return {}

    def _stop(self, _: dict[str, Any]) -> object:
        self._machine.stop()
        return {}

    def _system_reset(self, _: dict[str, Any]) -> object:
        reason = {"guest": False, "reason": "host-qmp-system-reset"}
        no_reboot = self._machine.options.no_reboot
        # Registers of an SEV-ES guest cannot be reset from outside, so QEMU ends instead.
        if self._machine.is_es and not no_reboot:
            complain("cpus are not resettable, terminating")
        if self._machine.is_es or no_reboot:
            self._machine.emit("SHUTDOWN", reason)
            self._power_off()
        else:
            self._machine.emit("RESET", reason)
        return {}

    def _quit(self, _: dict[str, Any]) -> object:
        self._machine.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._power_off()
        return {}


def _check_request(session: Session, request: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(request, dict):
        raise QmpError("QMP input must be a JSON object")
    spellings = {"execute", "exec-oob"} if session.oob else {"execute"}
    given = [member for member in request if member in spellings]
    for member, value in request.items():
        if member in spellings and not isinstance(value, str):
            raise QmpError(f"QMP input member '{member}' must be a string")
        if member == "arguments" and not isinstance(value, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if member not in spellings | {"arguments", "id"}:
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if not given:
        raise QmpError("QMP input lacks member 'execute'")
    if len(given) > 1:
        raise QmpError("QMP input member 'exec-oob' clashes with 'execute'")
    name: str = request[given[0]]
    if given[0] == "exec-oob" and name in _SCHEMA:
        raise QmpError(f"The command {name} does not support OOB")
    return name, request.get("arguments", {})


def _check_arguments(parameters: _Parameters, arguments: dict[str, Any]) -> None:
    for name, (kind, required) in parameters.items():
        if name in arguments:
            _check_type(name, kind, arguments[name])
        elif required:
            raise QmpError(f"Parameter '{name}' is missing")
    for name in arguments:
        if name not in parameters:
            raise QmpError(f"Parameter '{name}' is unexpected")
    if isinstance(arguments.get("gpa"), int):
        arguments["gpa"] &= 0xFFFFFFFFFFFFFFFF  # a negative number wraps, as in QEMU


def _check_type(name: str, kind: _Type, value: object) -> None:
    if kind is _Type.UINT64:
        if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 64:
            raise QmpError(f"Parameter '{name}' expects uint64")
    elif kind is _Type.OBJECT:
        if not isinstance(value, dict):
            raise QmpError(f"Invalid parameter type for '{name}', expected: object")
    elif kind is _Type.LIST:
        if not isinstance(value, list):
            raise QmpError(f"Invalid parameter type for '{name}', expected: array")
    elif not isinstance(value, str):
        raise QmpError(f"Invalid parameter type for '{name}', expected: string")
    elif kind is _Type.EXPANSION and value not in _EXPANSIONS:
        raise QmpError(f"Parameter '{name}' does not accept value '{value}'")


def _negotiate(session: Session, wanted: list[object]) -> object:
    for number, capability in enumerate(wanted):
        if not isinstance(capability, str):
            raise QmpError(f"Invalid parameter type for 'enable[{number}]', expected: string")
        if capability != "oob":
            raise QmpError(f"Parameter 'enable[{number}]' does not accept value '{capability}'")
    session.negotiated, session.oob = True, "oob" in wanted
    return {}
