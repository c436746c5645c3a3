"""Mutual TLS, identities, authorisation and errors of both gRPC services: everything that knows grpc, and no product.

`server.Server` and `client.open_channel` are the two ways in. Nothing here decides anything about a launch.
"""

from __future__ import annotations

import os

# gRPC's C core writes every failed handshake to stderr, by its own format and past our log; ours says the same in one
# line. Must be set before grpc is first imported, hence here; whoever sets the variable keeps what they set.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# The largest message, bytes, both ways. A chain with its session is some 10 KiB; images never travel, digests do.
MAX_MESSAGE = 65536
# The same on the owner's listener, where documents travel: a text of 256 KiB, answered with its defaults written out.
MAX_ADMIN_MESSAGE = 1 << 20
# Calls under way on one connection.
MAX_STREAMS = 64
