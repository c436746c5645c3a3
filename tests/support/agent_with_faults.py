"""The agent as it is, but for one thing: it kills itself where a step passes a point that the test names.

    python -m tests.support.agent_with_faults CONFIG POINT

The point is one of those that steps report to their observer (`host_agent.launches.custody.Observer`), which a service
writes into its log. Nothing in the agent knows of this module.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from uuid import UUID

from common.hardening import harden_process
from common.telemetry.log import configure
from host_agent import app, config


def main() -> None:
    """Serve, until the point is passed."""
    path, point = Path(sys.argv[1]), sys.argv[2]

    def observe(passed: str, _launch_id: UUID, /) -> None:
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    async def serve() -> None:
        agent = app.build(config.load(path, os.environ), log=configure("sev-host-agent"), observe=observe)
        await app.serve(agent, ready=_say, reload=lambda: config.load(path, os.environ))

    harden_process()
    asyncio.run(serve())


def _say(address: str) -> None:
    sys.stdout.write(f"sev-host-agent: serving on {address}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
