"""The launch digest: what of a guest is measured, and in which order."""
