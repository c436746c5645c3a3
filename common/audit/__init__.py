"""What proves afterwards what the verifier did: the chained log, its checkpoints, and signed tokens."""
