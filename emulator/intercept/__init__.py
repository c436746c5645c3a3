"""The software PSP under an unmodified program: its calls to /dev/sev and to KVM's SEV commands, answered by us.

seccomp user notification (Linux 5.19 or newer) stops a call in the kernel and asks the supervisor, which reads and
writes the caller's memory and answers in the kernel's stead. Not a security boundary: for tests and demonstrations.

filter      which system calls are asked about, as a BPF program (pure)
seccomp     linux/seccomp.h: installing the filter, the listener at its other end
memory      the caller's memory, by process_vm_readv(2) and process_vm_writev(2)
processes   what /proc says of a caller's descriptors
psp_sev     linux/psp-sev.h: numbers and structs (pure)
kvm         linux/kvm.h: numbers and structs of KVM's SEV commands (pure)
link        connections to the served platform, errors in the kernel's numbers
dev_sev     the file behind /dev/sev, and SEV_ISSUE_CMD on it
kvm_sev     KVM_MEMORY_ENCRYPT_OP on one virtual machine
machines    which virtual machines there are, and what their processes told KVM of their vCPUs
calls       one notification: whose it is, and its answer
spawn       a child that runs the program under the filter
supervisor  composition root: the loop, signals, the end
"""
