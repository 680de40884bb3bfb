"""Network namespaces on a bridge of this machine: each service in one of its own, and cuts between them.

Addresses are of the range for benchmarks (RFC 2544), which nobody routes; nothing leaves the bridge.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from holdfast import StateManager
from holdfast.pki import Kind, init_authority, issue
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.options import TlsFiles
from tests.faults.cluster import REPLICA_WAIT_S

_HOST_NUMBER: Final = 1
_INNER: Final = "inner0"


class Network:
    """Names on one bridge, each in a namespace with an address of its own, with certificates; a `Place`."""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        """Make it all; `stack` takes it away again."""
        # What two test processes make at the same time must not collide; a name of an interface has 15 characters.
        self._tag = f"{os.getpid() % 100_000:05d}"
        self._subnet = f"198.18.{os.getpid() % 250 + 1}"
        self._numbers = {name: number for number, name in enumerate(names, _HOST_NUMBER + 1)}
        self._authority = folder / "pki"
        self.etcd_host = f"{self._subnet}.{_HOST_NUMBER}"
        self._bridge = f"hfb{self._tag}"
        _ip("link", "add", self._bridge, "type", "bridge")
        stack.callback(_ip, "link", "delete", self._bridge)
        _ip("address", "add", f"{self.etcd_host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name in names:
            self._add(name, stack)
        init_authority(self._authority, clock=SystemClock())
        kinds = {name: Kind.COORDINATOR if name.startswith("coordinator") else Kind.NODE for name in names}
        for name, kind in (*kinds.items(), ("ann", Kind.ADMIN)):
            hosts = [self.host(name)] if name in self._numbers else []
            issue(self._authority, name, kind=kind, clock=SystemClock(), hosts=hosts)

    def options(self, name: str, kind: str) -> Sequence[str]:
        """See `Place`."""
        files = self._authority / name
        return ("--tls-ca", f"{files}/ca.pem", "--tls-cert", f"{files}/cert.pem", "--tls-key", f"{files}/key.pem")

    def bind(self, name: str) -> str:
        """See `Place`."""
        return f"{self.host(name)}:0"

    def within(self, name: str) -> Sequence[str]:
        """See `Place`."""
        return ("ip", "netns", "exec", self._namespace(name))

    def manager(self, address: str) -> StateManager:
        """See `Place`."""
        files = self._authority / "ann"
        tls = TlsFiles(ca=files / "ca.pem", cert=files / "cert.pem", key=files / "key.pem")
        return StateManager(address, tls=tls, replica_wait_s=REPLICA_WAIT_S)

    def host(self, name: str) -> str:
        """Return the address of a name."""
        return f"{self._subnet}.{self._numbers[name]}"

    @contextmanager
    def unplugged(self, *names: str) -> Iterator[None]:
        """Take the cables of these out for the length of the block."""
        for name in names:
            _ip("link", "set", self._port(name), "down")
        try:
            yield
        finally:
            for name in names:
                _ip("link", "set", self._port(name), "up")

    @contextmanager
    def unheard(self, name: str, *others: str) -> Iterator[None]:
        """Lose what a name sends to these others, without a word, for the length of the block."""
        hosts = [self.host(other) for other in others]
        for host in hosts:
            # To an address on the wire that nobody has.
            self._inside(name, "neighbour", "replace", host, "lladdr", "02:00:00:00:00:01", "nud", "permanent")
        try:
            yield
        finally:
            for host in hosts:
                self._inside(name, "neighbour", "delete", host)

    def _add(self, name: str, stack: ExitStack) -> None:
        namespace, port = self._namespace(name), self._port(name)
        _ip("netns", "add", namespace)
        # With it goes the pair of interfaces that ends in it.
        stack.callback(_ip, "netns", "delete", namespace)
        _ip("link", "add", port, "type", "veth", "peer", "name", _INNER, "netns", namespace)
        _ip("link", "set", port, "master", self._bridge, "up")
        self._inside(name, "address", "add", f"{self.host(name)}/24")
        for interface in (_INNER, "lo"):
            _ip("-netns", namespace, "link", "set", interface, "up")

    def _inside(self, name: str, *arguments: str) -> None:
        """Run a command about the interface of a name."""
        _ip("-netns", self._namespace(name), *arguments, "dev", _INNER)

    def _namespace(self, name: str) -> str:
        return f"hf-{self._tag}-{name}"

    def _port(self, name: str) -> str:
        return f"hfp{self._tag}x{self._numbers[name]}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"may this process make network namespaces? ip {' '.join(arguments)}: {done.stderr}"
