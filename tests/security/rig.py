"""A cluster of processes that was busy and is gone: its disks, its logs, what was stored on it, and its secrets."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast import Codec, HoldfastError, StateManager, VolumeSpec
from holdfast.key_file import make_data_key, read_key_file
from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.chain import audit_purpose, signing_purpose, tenant_purpose
from holdfast_coordinator.main import METADATA_FILE
from holdfast_coordinator.records import parse
from holdfast_core.model.keys import KeyRing, TenantSecrets, unwrap_secret
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import new_token, parse_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import KeyValue
from holdfast_proto.v1 import keys_pb2, state_pb2, tenants_pb2
from holdfast_proto.v1.common_pb2 import TenantKeys
from holdfast_proto.v1.records_pb2 import WrappedSecret
from tests.client.keyed import ask
from tests.client.rig import BLOCK, error_of, noise, write_at
from tests.coordinator.rig import Client
from tests.e2e.harness import eventually
from tests.e2e.services import Service, Tokens

NODES = ("node-1", "node-2", "node-3")
VM = "busy-1"
TENANT = "own"
PHRASE = b"<<what was said in confidence on the busy machine, word for word>>"


def forms(secret: bytes) -> Iterator[bytes]:
    """The ways in which bytes may lie in a file: raw, hexadecimal, base64 at any offset, and as Python shows them."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield repr(secret)[2:-1].encode()
    for encode, shift in itertools.product((base64.b64encode, base64.urlsafe_b64encode), range(3)):
        # The characters that hold bits of the secret alone, whatever stands before and after it.
        whole = encode(bytes(shift) + secret)
        yield whole[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]


def found_in(files: Mapping[str, bytes], secrets: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """(secret, file) wherever a secret lies in a file in any form; both by their names."""
    needles = {name: set(forms(secret)) for name, secret in secrets.items()}
    return [
        (name, file)
        for file, data in files.items()
        for name, ways in needles.items()
        if any(needle in data for needle in ways)
    ]


def contents(*folders: Path) -> dict[str, bytes]:
    """Every file below the folders, whole."""
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@dataclass
class Run:
    """What a busy run left.

    Attributes:
        folder: `data/` has a directory a service, `logs/` a log a service and that of the SDK, `keys/` the master key.
        plaintext: what was stored, by name.
        tokens: texts of tokens and capabilities that went over the wire, by name.
        snapshot_id: a point of VM.
        files: every file of `data/` and `logs/`, as the run left it.
    """

    folder: Path
    plaintext: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    snapshot_id: str = ""
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def master_key(self) -> bytes:
        """The cluster's master key, which was on another disk."""
        return (self.folder / "keys" / "master.key").read_bytes()

    def metadata(self) -> list[KeyValue]:
        """Everything that the metadata store holds."""

        async def read() -> list[KeyValue]:
            store = await SqliteStore.open(self.folder / "data" / "coordinator" / METADATA_FILE, SystemClock())
            try:
                return list((await store.snapshot([""])).items)
            finally:
                await store.close()

        return asyncio.run(read())

    def secrets(self) -> dict[str, bytes]:
        """Every key of the cluster by name, unwrapped with the master key as a coordinator does it."""
        found = {"master key": self.master_key}
        for item in self.metadata():
            for prefix, purpose in (
                (keyspace.SIGNING_PREFIX, signing_purpose),
                (keyspace.AUDIT_KEYS_PREFIX, audit_purpose),
            ):
                if item.key.startswith(prefix):
                    name = item.key.removeprefix(prefix)
                    found[item.key] = unwrap_secret(self.master_key, parse(item, WrappedSecret).message, purpose(name))
        for number in (0, 1, 2):
            found |= self._tenants(self.tenant_secrets(number))
        own = read_key_file(self.folder / "keys" / "own.key")
        return found | {"own data root": own.root} | {f"own data {e}": s for e, s in own.epochs.items()}

    def tenant_secrets(self, tenant: int) -> TenantSecrets:
        """What the metadata store holds of a tenant's secrets."""
        key = keyspace.TenantKeyspace(tenant).keys
        (item,) = (item for item in self.metadata() if item.key == key)
        plain = unwrap_secret(self.master_key, parse(item, WrappedSecret).message, tenant_purpose(tenant))
        return TenantSecrets.from_message(TenantKeys.FromString(plain))

    def _tenants(self, secrets: TenantSecrets) -> dict[str, bytes]:
        name = f"tenant {secrets.tenant}"
        found = {f"{name} structure root": secrets.structure_root}
        found |= {f"{name} structure {epoch}": secret for epoch, secret in secrets.structure_epochs.items()}
        found |= {f"{name} data {epoch}": secret for epoch, secret in secrets.data_epochs.items()}
        if secrets.data_root is not None:
            ring = KeyRing(secrets)
            found[f"{name} data root"] = secrets.data_root
            found |= {f"{name} cutting": ring.cutting_key, f"{name} mac": ring.record_mac_key}
        return found


@contextmanager
def _running(folder: Path, tokens: Tokens) -> Iterator[str]:
    """A coordinator and three nodes as processes that log all they can; yields the coordinator's address."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> Service:
            options = ("--data", str(folder / "data" / name), "--log-level", "debug")
            service = Service(name, (*arguments, *options), folder / "logs" / f"{name}.log").start()
            stack.callback(service.stop)
            return service

        key = ("--master-key", str(folder / "keys" / "master.key"), "--create-master-key")
        sizes = ("--nodes", str(len(NODES)), "--replicas", "3", "--partitions", "16")
        coordinator = start("coordinator", "coordinator", *sizes, *key, *tokens.coordinator_options)
        for name in NODES:
            joining = ("storagenode", "--coordinator", coordinator.address, "--node-id", name, "--zone", name)
            start(name, *joining, *tokens.node_options)
        yield coordinator.address


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Everything that this process, which is the client, can say goes to a file."""
    handler = logging.FileHandler(path)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def make_run(folder: Path) -> Run:
    """Run a cluster, use it in every way, and end it."""
    run = Run(folder)
    for part in ("data", "logs", "keys", "work"):
        (folder / part).mkdir()
    tokens = Tokens.make(folder / "keys")
    run.tokens |= {"admin": tokens.admin.read_text().strip(), "node": tokens.node.read_text().strip()}
    with _logging_to(folder / "logs" / "sdk.log"), _running(folder, tokens) as address:
        admin = run.tokens["admin"]
        with StateManager(address, token=admin) as manager:
            eventually(lambda: manager.cluster_status().writable, "the cluster takes writes")
            _store(run, manager, VM)
            run.tokens |= asyncio.run(_ask(address, admin))
            _change_keys(address, admin)
            _store(run, manager, VM)
            _fail(run, manager, address)
        make_data_key(folder / "keys" / "own.key", random_bytes=os.urandom)
        ask(address, admin, "tenants", "CreateTenant", tenants_pb2.CreateTenantRequest(name=TENANT, own_data_key=True))
        with StateManager(address, token=admin, tenant=TENANT, key_file=folder / "keys" / "own.key") as manager:
            _store(run, manager, "own-1")
    run.files = contents(folder / "data", folder / "logs")
    return run


def _mark(run: Run, name: str) -> bytes:
    """64 bytes that no codec makes smaller, remembered."""
    marker = run.plaintext[name] = noise(64, seed=len(run.plaintext) + 1000)
    return marker


def _store(run: Run, manager: StateManager, vm: str) -> None:
    """Snapshot, change, back up, restore and verify a VM; store and read application data."""
    turn = f"{vm} {len(run.plaintext)}"
    run.plaintext["phrase"] = PHRASE
    specs = {}
    for seed, codec in enumerate((Codec.DEFAULT, Codec.STORED)):
        path = run.folder / "work" / f"{vm}-{codec.name}.raw"
        text = PHRASE * (BLOCK // len(PHRASE)) + _mark(run, f"{turn} {codec.name}")
        path.write_bytes(noise(4 * BLOCK, seed=seed) + text.ljust(2 * BLOCK, b"."))
        specs[codec.name.lower()] = VolumeSpec(path, codec=codec)
    manager.register_vm(vm, specs, replace=True)
    run.snapshot_id = manager.create_snapshot(vm)
    for name, spec in specs.items():
        write_at(Path(spec.uri), BLOCK + 7, _mark(run, f"{turn} {name} changed"))
    backup = manager.incremental_backup(vm, run.snapshot_id)
    manager.restore_vm(run.snapshot_id, backup, target=run.folder / "work" / f"restored-{backup}")
    assert manager.verify(backup).blocks > 0
    data = noise(BLOCK) + _mark(run, f"{turn} object") + PHRASE
    stored = manager.persist_application_data("busy-task", data)
    assert manager.retrieve_application_data(stored) == data


async def _ask(address: str, admin: str) -> dict[str, str]:
    """Past the SDK: make a token, use it where it may and where it may not, take capabilities; return all of them."""
    client = Client(address, token=admin)
    token = await client.new_token("agent-7")
    await client.bind(("agent-7", "backup-writer", "vm/other"))
    begun = await client.begin(VM)
    await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=begun.session_id))
    foreign = new_token(os.urandom)
    for text in (token, foreign, "hft_nonsense"):
        other = Client(address, token=text)
        error = None
        try:
            await other.begin(VM)
        except HoldfastError as refused:
            error = refused
        assert error is not None
        await other.close()
    await client.close()
    return {"agent's": token, "unknown": foreign, "capability": begun.grant.capability}


def _change_keys(address: str, admin: str) -> None:
    for request in (
        keys_pb2.RotateTenantKeysRequest(data=True, structure=True),
        keys_pb2.RotateSigningKeyRequest(purpose="capability"),
        keys_pb2.RotateSigningKeyRequest(purpose="audit"),
    ):
        name = type(request).__name__.removesuffix("Request")
        ask(address, admin, "keys", name, request)


def _fail(run: Run, manager: StateManager, address: str) -> None:
    """What goes wrong is where programs say too much."""
    wrong = run.folder / "work" / "wrong.key"
    make_data_key(wrong, random_bytes=os.urandom)
    attempts: Iterable[Callable[[], object]] = (
        lambda: manager.create_snapshot("nobody"),
        lambda: manager.restore_vm("snap-" + "a" * 26, target=run.folder / "work" / "none"),
        lambda: manager.retrieve_application_data("app-" + "a" * 26),
        lambda: stranger.list_vms(),
        lambda: keyed.create_snapshot(VM),
    )
    with (
        StateManager(address, token=new_token(os.urandom)) as stranger,
        StateManager(address, token=run.tokens["admin"], key_file=wrong) as keyed,
    ):
        for attempt in attempts:
            assert error_of(attempt).message


def secret_of(token: str) -> bytes:
    """What of a token or capability must not be seen: the secret after a token's id, a capability's signature."""
    if token.startswith("hft_"):
        token_id, _ = parse_token(token)
        return token.split(token_id)[1].encode()
    return token.rsplit(".", 1)[1].encode()


def log_lines(data: bytes) -> list[dict[str, object]]:
    """The lines of a service's log."""
    return [json.loads(line) for line in data.decode().splitlines() if line.startswith("{")]
