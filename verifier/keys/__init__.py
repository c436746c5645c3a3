"""The verifier's own keys: sealing what is stored, and the fresh key of each launch."""
