"""Running an agent: where it listens, for whom, and until when."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.agent.callers import AllowedCallers
from holdfast.agent.paths import AllowedPaths
from holdfast.agent.service import SERVICE_NAME, AgentService
from holdfast.aio import AsyncStateManager
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import UNIX_SCHEME, TlsFiles
from holdfast_core.runtime.server import ServiceHost
from holdfast_core.runtime.signals import termination_signals
from holdfast_proto.v1.agent_pb2_grpc import add_StateManagerServicer_to_server

_SOCKET_MASK = 0o177
_PROBE_S = 2.0


def check_listen(listen: str, *, tls: TlsFiles | None, allow: Sequence[str], below: Sequence[Path]) -> None:
    """Check that whoever can reach the agent may also use it.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a TCP address without TLS, without callers or without directories: any user
            of the host could reach it, and it reads files with its own rights.
    """
    if listen.startswith(UNIX_SCHEME):
        if allow:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, "--allow is for TLS; a Unix socket serves whoever may open it, its owner"
            )
        return
    needed = {"--agent-tls-ca, --agent-tls-cert and --agent-tls-key": tls, "--allow": allow, "--below": below}
    for option, given in needed.items():
        if not given:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"an agent at {listen} is reached by other users and hosts: give {option}, or listen on unix:PATH",
            )


def clear_stale_socket(listen: str) -> None:
    """Remove a socket that an agent left which is gone.

    Raises:
        HoldfastError: CONFLICT if something else is there, or a living agent.
    """
    if not listen.startswith(UNIX_SCHEME):
        return
    path = listen.removeprefix(UNIX_SCHEME)
    try:
        kind = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise HoldfastError(ErrorCode.CONFLICT, f"{path} is there and no socket; name another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise HoldfastError(ErrorCode.CONFLICT, f"another program listens on {path}; name another path")


def _remove_socket(listen: str) -> None:
    Path(listen.removeprefix(UNIX_SCHEME)).unlink(missing_ok=True)


async def serve_agent(
    manager: AsyncStateManager,
    *,
    listen: str,
    tls: TlsFiles | None,
    allow: Sequence[str] = (),
    below: Sequence[Path] = (),
    metrics_bind: str | None = None,
    started: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end. `started` is told the address.

    Raises:
        HoldfastError: INVALID_ARGUMENT or CONFLICT, before anything is served.
    """
    check_listen(listen, tls=tls, allow=allow, below=below)
    clear_stale_socket(listen)
    local = listen.startswith(UNIX_SCHEME)
    host = ServiceHost(
        "agent",
        bind=listen,
        tls=None if local else tls,
        metrics_bind=metrics_bind,
        guard=None if local else AllowedCallers(allow),
    )
    host.add(add_StateManagerServicer_to_server, AgentService(manager, AllowedPaths(below)), SERVICE_NAME)
    with termination_signals() as asked:
        # The socket gets its mode when it is made: a moment in which others may open it is enough for them.
        before = os.umask(_SOCKET_MASK)
        try:
            await host.start()
        finally:
            os.umask(before)
        try:
            started(host.address)
            await asked.wait()
        finally:
            await host.stop()
            if local:
                _remove_socket(listen)
