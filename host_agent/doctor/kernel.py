"""The kernel: its command line, KVM and its SEV switches, ASIDs in use, and /dev/sev.

Sources: Linux `arch/x86/kvm/svm/sev.c` (module parameters; /proc and sysfs spell them Y, N, 1, 0),
Documentation/admin-guide/cgroup-v2.rst (`misc.capacity`, `misc.current`: keys `sev`, `sev_es`),
Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

from collections.abc import Iterator

from host_agent.doctor.findings import Finding, failed, passed, skipped, warned
from host_agent.doctor.machine import Machine
from host_agent.doctor.processor import SYSCFG_SME, Processor

KVM_PARAMETERS = "/sys/module/kvm_amd/parameters"
_ON = frozenset({"Y", "1"})
_CGROUP = "/sys/fs/cgroup"
_OFF = ("kvm_amd.sev=0", "kvm_amd.sev=n", "kvm_amd.sev=N")
_ES_OFF = ("kvm_amd.sev_es=0", "kvm_amd.sev_es=n", "kvm_amd.sev_es=N")
_PARAMETERS_ADVICE = "put `kvm_amd.sev=1 kvm_amd.sev_es=1` on the kernel's command line and reboot"
_ASID_LIMIT = "raise the BIOS's `SEV-ES ASID Space Limit` first, which is 1"


def parameter(machine: Machine, name: str) -> str | None:
    """A parameter of kvm_amd as the kernel spells it; None where there is none."""
    try:
        return machine.text(f"{KVM_PARAMETERS}/{name}").strip()
    except OSError:
        return None


def snp_is_on(machine: Machine) -> bool:
    """Whether KVM may start SEV-SNP guests: then the firmware runs in its SNP mode."""
    return parameter(machine, "sev_snp") in _ON


def probe(machine: Machine, cpu: Processor, *, es: bool, device: str | None) -> Iterator[Finding]:
    """What the kernel means for launches.

    Args:
        machine: to look at.
        cpu: its processor: what the BIOS does not give, the kernel switches off by itself.
        es: whether guests with SEV-ES are to be launched.
        device: path of the SEV device; None where nobody opens it as this user.
    """
    off = _switched_off(machine, es=es)
    yield _command_line(machine, off)
    yield _kvm(machine)
    sev, sev_es = parameter(machine, "sev"), parameter(machine, "sev_es")
    yield _switch("sev", "kvm.sev", sev, advice=_why_off(cpu, off), fatal=True)
    if sev is not None and sev_es is None:
        complain = failed if es else warned
        yield complain("kvm.sev_es", "this kernel's KVM knows no SEV-ES", "use Linux 5.11 or newer")
    else:
        advice = _ASID_LIMIT if sev in _ON and cpu.es_asids == 0 else _why_off(cpu, off)
        yield _switch("sev_es", "kvm.sev_es", sev_es, advice=advice, fatal=es)
    yield _free_asids(machine, es=es)
    yield from _device(machine, device)


def _switched_off(machine: Machine, *, es: bool) -> str | None:
    """The word of the kernel's command line that switches SEV or SEV-ES off; None where there is none."""
    try:
        words = machine.text("/proc/cmdline").split()
    except OSError:
        return None
    return next((off for off in _OFF + (_ES_OFF if es else ()) if off in words), None)


def _why_off(cpu: Processor, off: str | None) -> str:
    if off is not None:
        return f"take {off} out of the kernel's command line and reboot"
    if cpu.switched_on(SYSCFG_SME) is False:
        return "enable SMEE in the BIOS first: without it the kernel switches SEV off"
    return f"{_PARAMETERS_ADVICE}; where they are there, see device.present: without its firmware KVM switches SEV off"


def _command_line(machine: Machine, off: str | None) -> Finding:
    try:
        words = machine.text("/proc/cmdline").split()
    except OSError as error:
        return skipped("kernel.command_line", f"/proc/cmdline cannot be read: {error.strerror}")
    if off is not None:
        return failed("kernel.command_line", f"says {off}", f"take {off} out of the kernel's command line and reboot")
    if "mem_encrypt=off" in words:
        return warned(
            "kernel.command_line", "says mem_encrypt=off", "say mem_encrypt=on, so that the host encrypts too"
        )
    wanted = [word for word in ("mem_encrypt=on", "kvm_amd.sev=1", "kvm_amd.sev_es=1") if word in words]
    return passed(
        "kernel.command_line", f"says {' '.join(wanted)}" if wanted else "leaves SEV at the kernel's defaults"
    )


def _kvm(machine: Machine) -> Finding:
    try:
        version = machine.kvm_api()
    except OSError as error:
        advice = "load kvm_amd, enable SVM in the BIOS, and give this user access to /dev/kvm (group kvm)"
        return failed("kvm.device", f"/dev/kvm: {error.strerror}", advice)
    return passed("kvm.device", f"/dev/kvm answers, API version {version}")


def _switch(name: str, probe_id: str, value: str | None, *, advice: str, fatal: bool) -> Finding:
    if value in _ON:
        return passed(probe_id, f"kvm_amd's parameter {name} is {value}")
    complain = failed if fatal else warned
    if value is None:
        seen = f"there is no {KVM_PARAMETERS}/{name}"
        return complain(probe_id, seen, "load kvm_amd (on an AMD host with SVM enabled in the BIOS)")
    return complain(probe_id, f"kvm_amd's parameter {name} is {value}", advice)


def _free_asids(machine: Machine, *, es: bool) -> Finding:
    kind = "sev_es" if es else "sev"
    try:
        capacity = _counts(machine.text(f"{_CGROUP}/misc.capacity"))
        # The root's own count is there in newer kernels only.
        current = _counts(machine.text(f"{_CGROUP}/misc.current"))
    except OSError:
        return skipped(
            "kvm.asids_free",
            "the kernel does not show how many ASIDs are taken",
            "cgroup v2 with the misc controller shows it (misc.capacity, misc.current)",
        )
    if kind not in capacity:
        return skipped("kvm.asids_free", f"the kernel has no ASIDs of kind {kind} to give")
    free = capacity[kind] - current.get(kind, 0)
    seen = f"{free} of {capacity[kind]} {kind} ASIDs are free"
    if free <= 0:
        advice = "end guests of that kind, or change the split in the BIOS (SEV-ES ASID Space Limit)"
        return failed("kvm.asids_free", seen, advice)
    return passed("kvm.asids_free", seen)


def _counts(text: str) -> dict[str, int]:
    words = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _device(machine: Machine, path: str | None) -> Iterator[Finding]:
    if path is None:
        for probe_id in ("device.present", "device.writable"):
            yield skipped(probe_id, "neither the agent nor a machine of its user's opens /dev/sev")
        return
    try:
        machine.try_open(path)
    except FileNotFoundError:
        advice = (
            "look at `dmesg | grep -e ccp -e SEV`: the BIOS must enable SEV, and the kernel must have the ccp driver"
        )
        yield failed("device.present", f"there is no {path}", advice)
        yield skipped("device.writable", f"there is no {path}")
        return
    except PermissionError:
        rule = "a group and a udev rule (deploy/host-agent/70-sev.rules)"
        advice = f"give this user access to {path}, by {rule}, and run this as the agent's user"
        yield failed("device.present", f"{path} may not be opened by this user", advice)
    except OSError as error:
        advice = "the node is there without its driver: look at `dmesg | grep -e ccp -e SEV`"
        yield failed("device.present", f"{path} cannot be opened: {error.strerror}", advice)
        yield skipped("device.writable", f"{path} cannot be opened")
        return
    else:
        yield passed("device.present", f"{path} can be opened for reading, which is all that the agent does")
    if machine.is_writable(path):
        yield passed("device.writable", f"this user may write to {path}, which QEMU does")
    else:
        advice = f"QEMU opens {path} for writing: let its user, which is the agent's, do so (and nobody else)"
        yield failed("device.writable", f"this user may not write to {path}", advice)
