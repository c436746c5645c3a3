"""The untrusted side: the host agent, over QMP and the SEV device; holds nothing secret."""
