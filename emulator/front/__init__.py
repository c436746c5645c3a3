"""The front of a real QEMU: SEV on its command line and its monitor, answered by the software PSP, under TCG.

command_line   QEMU's words in; what SEV there is, which monitors, and the words for the real QEMU out (pure)
channels       where a monitor's clients come from: sockets and standard streams in every spelling
layout         where the RAM of QEMU's PCs lies (pure)
boot_files     what the real QEMU is handed as kernel, and what its firmware will see of it
registers      a save area held against the reset state that the real QEMU reports (pure)
real_qemu      the real QEMU's process, and a monitor of our own on it
relay          one client's conversation, byte for byte, with our answers in their places
machine        composition root: the launch in QEMU's order, then service until the machine ends
"""
