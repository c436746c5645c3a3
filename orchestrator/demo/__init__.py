"""The demonstration: all parties of a launch on one machine, each a process of its own, in a temporary folder."""
