"""A software SEV platform that stands in for the hardware; writes the firmware's half a second time."""
