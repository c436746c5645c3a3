"""AMD's SEV and SEV-ES API (document 55766) as pure code: bytes in, values out; no socket, clock, file, event loop."""
