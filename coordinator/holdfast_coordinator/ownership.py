"""What a call is about and whose it is: names of resources, and who may go on with a session.

A session belongs to the principal that began it, as long as that one still holds the permission that it began with: it
is asked again at every call, so that taking it away stops the session at once. To anybody else an open session is what
one that never was would be.
"""

from __future__ import annotations

from typing import Protocol

from holdfast_coordinator.audit.entry import Entry
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import BACKUP_PREFIX, OBJECT_PREFIX
from holdfast_proto.v1.records_pb2 import SessionRecord

APP_LIST = "app.list"
APP_READ = "app.read"
APP_WRITE = "app.write"
BACKUP_CREATE = "backup.create"
CLUSTER_READ = "cluster.read"
POINT_LIST = "point.list"
POINT_RESTORE = "point.restore"
SNAPSHOT_CREATE = "snapshot.create"


class Caller(Protocol):
    """Who asks, as far as the logic behind a call needs to know. `access.call.Call` is one."""

    @property
    def principal(self) -> str:
        """The principal."""

    @property
    def entry(self) -> Entry:
        """What the audit log will say of the call."""

    def require(self, resource: str, *, otherwise: bool = False, permission: str = "") -> None:
        """Return if the principal may do this with the resource; name it in the entry. Raises DENIED."""

    def filtered(self, resource: str = "") -> None:
        """Say that nothing is told which needs a permission."""

    def may(self, permission: str, resource: str) -> bool:
        """Return whether the principal holds a permission on a resource."""


def of_vm(vm_id: str) -> str:
    """Return the resource of a VM, which all its points share."""
    return f"vm/{vm_id}"


def of_task(task_id: str) -> str:
    """Return the resource of a task, which all its objects share."""
    return f"task/{task_id}"


def of_tenant(name: str) -> str:
    """Return the resource of a tenant as a whole."""
    return f"tenant/{name}"


def of_session(session: SessionRecord) -> str:
    """Return the resource that a session writes to."""
    return of_task(session.task_id) if session.task_id else of_vm(session.vm_id)


def permission_of(session_id: str) -> str:
    """Return the permission that began a session, which its id tells."""
    if session_id.startswith(OBJECT_PREFIX):
        return APP_WRITE
    return BACKUP_CREATE if session_id.startswith(BACKUP_PREFIX) else SNAPSHOT_CREATE


def check_owner(caller: Caller, session: SessionRecord, step: str) -> None:
    """Check that a session is the caller's, and say in the entry what it does with it: `step`, e.g. "commit".

    A session without a principal is one of before there were any: whoever holds the permission goes on with it.

    Raises:
        HoldfastError: SESSION_LAPSED if it is another principal's; DENIED if the caller may not any more.
    """
    describe_step(caller.entry, session.session_id, step, of_session(session))
    if session.principal and session.principal != caller.principal:
        raise lapsed(session.session_id)
    caller.require(of_session(session), permission=permission_of(session.session_id))


def check_made(caller: Caller, session_id: str, step: str, resource: str) -> None:
    """Check that the caller may see what a session that is over has made. Raises DENIED."""
    describe_step(caller.entry, session_id, step, resource)
    caller.require(resource, permission=permission_of(session_id))
    caller.entry.repeated()


def check_may(caller: Caller, permission: str, resource: str) -> None:
    """Check one more permission than the call's own; the entry goes on naming what the call is about. Raises DENIED."""
    if not caller.may(permission, resource):
        raise HoldfastError(
            ErrorCode.DENIED,
            f"{caller.principal} does not hold {permission} on {resource}, which this call takes too",
            facts={"permission": permission, "resource": resource},
        )


def describe_step(entry: Entry, session_id: str, step: str, resource: str = "") -> None:
    """Say in the entry which step of which session a call is."""
    entry.action, entry.resource = permission_of(session_id), resource
    entry.details.update({"step": step, "object" if session_id.startswith(OBJECT_PREFIX) else "point": session_id})


def lapsed(session_id: str) -> HoldfastError:
    """Return the error for a session that is no longer open, or not the caller's."""
    return HoldfastError(
        ErrorCode.SESSION_LAPSED,
        f"the session {session_id} has lapsed, was taken over, or never was; nothing of it is visible, begin again",
    )
