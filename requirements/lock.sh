#!/bin/sh
# Renews the lock files: hashes, and no index address (tests/support/repository.py refuses one).
set -eu
cd "$(dirname "$0")/.."
compile() { uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-header --no-annotate -q "$@"; }
# Not the extra libvirt: it is built against the headers of the libvirt that a host has.
compile --extra agent --extra verifier --extra postgres --extra pkcs11 --extra vault --extra metrics --group dev -o requirements/dev.txt
compile --extra agent --extra metrics -o requirements/agent.txt
compile --extra verifier --extra postgres --extra pkcs11 --extra vault --extra metrics -o requirements/verifier.txt
compile -o requirements/orchestrator.txt
