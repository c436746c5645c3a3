"""How the orchestrator reaches the two sides of a launch: one module a way, all behind the Protocols of `base`."""
