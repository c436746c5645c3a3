"""Which roles may call which method: one table over every service, and nothing else.

What the table does not name is denied. `Server.add` refuses a servicer with a method that has no row, and a test
calls every method of every service in `proto/` as every role.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from common.rpc.identity import Role

_ORCHESTRATOR = frozenset({Role.ORCHESTRATOR})
_OWNER = frozenset({Role.OWNER})
# Whoever may call a service may ask whether it is up; each listener narrows this to its own callers.
_HEALTH = _ORCHESTRATOR | _OWNER

METHODS: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        "/sevattest.v1.HostAgentService/ExportChain": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/GetPlatform": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/StartLaunch": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/GetMeasurement": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/InjectSecret": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/ResumeGuest": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/AbortLaunch": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/GetLaunch": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/ListLaunches": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/WatchLaunches": _ORCHESTRATOR,
        "/sevattest.v1.HostAgentService/GetAttestationReport": _ORCHESTRATOR,
        "/sevattest.v1.VerifierService/BeginLaunch": _ORCHESTRATOR,
        "/sevattest.v1.VerifierService/ReleaseSecret": _ORCHESTRATOR,
        "/sevattest.v1.VerifierService/AbandonLaunch": _ORCHESTRATOR,
        "/sevattest.v1.VerifierService/GetLaunch": _ORCHESTRATOR,
        "/sevattest.v1.VerifierService/VerifyReport": _ORCHESTRATOR,
        "/sevattest.v1.VerifierAdminService/ApplyDocument": _OWNER,
        "/sevattest.v1.VerifierAdminService/GetDocument": _OWNER,
        "/sevattest.v1.VerifierAdminService/ListDocuments": _OWNER,
        "/sevattest.v1.VerifierAdminService/DeleteDocument": _OWNER,
        "/sevattest.v1.VerifierAdminService/GetGrantStatus": _OWNER,
        "/sevattest.v1.VerifierAdminService/ListRevocationImpact": _OWNER,
        "/sevattest.v1.VerifierAdminService/PutSecret": _OWNER,
        "/sevattest.v1.VerifierAdminService/ListSecrets": _OWNER,
        "/sevattest.v1.VerifierAdminService/DeleteSecret": _OWNER,
        "/sevattest.v1.VerifierAdminService/GetLaunch": _OWNER,
        "/sevattest.v1.VerifierAdminService/ListLaunches": _OWNER,
        "/sevattest.v1.VerifierAdminService/ListAuditRecords": _OWNER,
        "/sevattest.v1.VerifierAdminService/ListCheckpoints": _OWNER,
        "/sevattest.v1.VerifierAdminService/GetSigningKeys": _OWNER,
        "/sevattest.v1.VerifierAdminService/Simulate": _OWNER,
        "/grpc.health.v1.Health/Check": _HEALTH,
        "/grpc.health.v1.Health/List": _HEALTH,
        "/grpc.health.v1.Health/Watch": _HEALTH,
    }
)
