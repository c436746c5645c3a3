"""A real guest: the parts that QEMU boots it from, and the initramfs that tells which secrets it was given."""
