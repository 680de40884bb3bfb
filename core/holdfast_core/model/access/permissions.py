"""Permissions and the roles that are built in: sets in dictionaries, and nothing else (DESIGN section 10, ADR 0076).

A permission of the cluster counts only from a binding for all tenants. A permission of tenants counts in the tenant
that the binding names, or in all. Two are never bound: `self.read` every principal has, and `session.own` belongs to
whoever began the session, as long as it holds what began it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

SELF_READ: Final = "self.read"
SESSION_OWN: Final = "session.own"

CLUSTER_PERMISSIONS: Final = frozenset(
    {"cluster.join", "cluster.admin", "tenant.admin", "access.admin", "keys.admin", "audit.read"}
)
TENANT_PERMISSIONS: Final = frozenset(
    {
        "cluster.read",
        "vm.register",
        "vm.list",
        "vm.discard",
        "snapshot.create",
        "backup.create",
        "point.list",
        "point.restore",
        "point.forget",
        "point.lock",
        "point.unlock",
        "app.write",
        "app.read",
        "app.list",
        "app.forget",
        "stats.read",
        "damage.report",
        "keys.rotate",
    }
)
PERMISSIONS: Final = CLUSTER_PERMISSIONS | TENANT_PERMISSIONS
"""Those that a role may hold."""

ADMIN_PERMISSIONS: Final = frozenset({"point.unlock"})
"""Those that the role `admin` alone holds: what guards against one's own backup agents is not given away by a role."""

IMPLIED_PERMISSIONS: Final = frozenset({SELF_READ, SESSION_OWN})

SESSION_PERMISSIONS: Final = frozenset({"snapshot.create", "backup.create", "app.write"})
"""Those that begin a session, and that going on with it asks for again."""

BUILT_IN_ROLES: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "admin": PERMISSIONS,
        # Repairs, drains and collects; sees what there is and reads none of it.
        "operator": frozenset({"cluster.read", "cluster.admin", "vm.list", "point.list", "app.list", "stats.read"}),
        "backup-writer": frozenset(
            {
                "vm.register",
                "vm.list",
                "snapshot.create",
                "backup.create",
                "point.list",
                # Who saves says for how long; taking that back is an administrator's.
                "point.lock",
                "stats.read",
                "damage.report",
                "cluster.read",
            }
        ),
        "restorer": frozenset({"vm.list", "point.list", "point.restore", "damage.report", "cluster.read"}),
        "app-writer": frozenset({"app.write", "app.list", "cluster.read"}),
        "app-reader": frozenset({"app.read", "app.list", "damage.report", "cluster.read"}),
        "auditor": frozenset({"audit.read", "vm.list", "point.list", "app.list", "stats.read", "cluster.read"}),
        "node": frozenset({"cluster.join"}),
    }
)
