"""`holdfast keys`: which keys there are, and changing them. No key is ever printed, and none crosses the wire."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_facts, print_json, print_line, print_table
from holdfast_core.model.errors import ErrorCode, HoldfastError

if TYPE_CHECKING:
    from holdfast_proto.v1.keys_pb2 import ListKeysResponse

app = typer.Typer(help="List, rotate, rewrap and make keys.", no_args_is_help=True)

_CAPABILITY: Final = "capability"
_AUDIT: Final = "audit"
_REWRAP_TIMEOUT_S: Final = 600.0

_FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="File to make; it must not exist.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command("list")
@on_cluster
def list_keys(connection: Connection) -> None:
    """List the tenant's key epochs; for administrators of keys also the keys that sign and the master key."""
    keys = _listed(connection)
    if connection.json:
        print_json(_as_json(keys))
        return
    facts = {
        "data epochs": ", ".join(map(str, keys.data_epochs)) or "kept by the tenant itself",
        "structure epochs": ", ".join(map(str, keys.structure_epochs)),
    }
    if keys.master_fingerprint:
        facts["master key"] = keys.master_fingerprint.hex()
        for fingerprint, count in sorted(keys.wrapped_by.items()):
            facts[f"wrapped by {fingerprint}"] = f"{count} secrets"
    print_facts(facts)
    if keys.signing_keys:
        print_line("")
        rows = [
            (key.purpose, key.key_id, "yes" if key.signing else "-", format_time(key.created_unix_ms))
            for key in keys.signing_keys
        ]
        print_table(("FOR", "KEY", "SIGNS", "MADE"), rows)


@app.command("rotate")
@on_cluster
def rotate(
    connection: Connection,
    structure: Annotated[
        bool,
        typer.Option("--structure", help="Rotate the structure secret too; the next backup writes inner nodes anew."),
    ] = False,
    signing: Annotated[
        bool, typer.Option("--signing", help="Rotate the key that signs capabilities, instead of the tenant's keys.")
    ] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Rotate the key that signs the audit log, instead of the tenant's keys.")
    ] = False,
    retire_now: Annotated[
        bool,
        typer.Option(
            "--retire-now",
            help="With --signing: remove the old keys at once, because one was stolen. What runs has to begin again.",
        ),
    ] = False,
) -> None:
    """Begin a new key epoch: new blocks are sealed with it, all older ones stay readable, nothing is rewritten.

    With --key-file the tenant's own data key gets the new epoch; give the file to all who write.
    """
    if signing + audit + structure > 1 or (retire_now and not signing):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            "--structure, --signing and --audit each rotate something else, and --retire-now goes with --signing",
        )
    if signing or audit:
        _rotate_signing(connection, _CAPABILITY if signing else _AUDIT, retire_now=retire_now)
    else:
        _rotate_tenant(connection, structure=structure)


@app.command("rewrap")
@on_cluster
def rewrap(connection: Connection) -> None:
    """Wrap all secrets by the coordinators' present master key; no data is touched."""
    from holdfast_proto.v1.keys_pb2 import RewrapKeysRequest
    from holdfast_proto.v1.keys_pb2_grpc import KeyServiceStub

    done = connection.call(
        lambda channel: KeyServiceStub(channel).RewrapKeys, RewrapKeysRequest(), timeout_s=_REWRAP_TIMEOUT_S
    )
    if connection.json:
        print_json({"rewrapped": done.rewrapped, "master_fingerprint": done.master_fingerprint})
    else:
        print_line(f"{done.rewrapped} secrets rewrapped by master key {done.master_fingerprint.hex()}")


@app.command("make")
def make(context: typer.Context, file: _FileArgument, json: _JsonOption = False) -> None:
    """Make a master key in a new file and print its fingerprint; no cluster is asked."""
    from holdfast.key_file import make_master_key

    _print_fingerprint(context, make_master_key(file, random_bytes=os.urandom), asked=json)


@app.command("make-data")
def make_data(context: typer.Context, file: _FileArgument, json: _JsonOption = False) -> None:
    """Make the data key of a tenant that keeps it itself, and print its fingerprint. Losing it loses the data."""
    from holdfast.key_file import make_data_key

    _print_fingerprint(context, make_data_key(file, random_bytes=os.urandom).fingerprint, asked=json)


def _listed(connection: Connection) -> ListKeysResponse:
    # Imported here: it brings gRPC, which `--help` and mistyped commands need not wait for.
    from holdfast_proto.v1.keys_pb2 import ListKeysRequest
    from holdfast_proto.v1.keys_pb2_grpc import KeyServiceStub

    return connection.call(lambda channel: KeyServiceStub(channel).ListKeys, ListKeysRequest())


def _rotate_signing(connection: Connection, purpose: str, *, retire_now: bool) -> None:
    from holdfast_proto.v1.keys_pb2 import RotateSigningKeyRequest
    from holdfast_proto.v1.keys_pb2_grpc import KeyServiceStub

    # Named, so that a call which is sent again because its answer was lost makes no second key. The newest, since the
    # one that signs now may have a successor already.
    known = [key.key_id for key in _listed(connection).signing_keys if key.purpose == purpose]
    made = connection.call(
        lambda channel: KeyServiceStub(channel).RotateSigningKey,
        RotateSigningKeyRequest(purpose=purpose, retire_now=retire_now, after_key_id=known[-1] if known else ""),
    )
    if connection.json:
        print_json({"purpose": purpose, "key_id": made.key_id, "public_key": made.public_key})
    else:
        print_line(made.key_id)


def _rotate_tenant(connection: Connection, *, structure: bool) -> None:
    from holdfast.key_file import rotate_data_key
    from holdfast_proto.v1.keys_pb2 import RotateTenantKeysRequest
    from holdfast_proto.v1.keys_pb2_grpc import KeyServiceStub

    own = connection.key_file
    epochs: dict[str, int] = {}
    if own is None or structure:
        seen = _listed(connection)
        request = RotateTenantKeysRequest(
            data=own is None,
            structure=structure,
            after_data_epoch=max(seen.data_epochs, default=0),
            after_structure_epoch=max(seen.structure_epochs, default=0),
        )
        done = connection.call(lambda channel: KeyServiceStub(channel).RotateTenantKeys, request)
        epochs = {"data_epoch": done.data_epoch, "structure_epoch": done.structure_epoch}
    if own is not None:
        epochs["data_epoch"] = rotate_data_key(own, random_bytes=os.urandom).newest
    if connection.json:
        print_json(epochs)
        return
    print_line(f"data epoch {epochs['data_epoch']}")
    if structure:
        print_line(f"structure epoch {epochs['structure_epoch']}")


def _as_json(keys: ListKeysResponse) -> dict[str, object]:
    return {
        "data_epochs": list(keys.data_epochs),
        "structure_epochs": list(keys.structure_epochs),
        "master_fingerprint": keys.master_fingerprint,
        "wrapped_by": dict(keys.wrapped_by),
        "signing_keys": [
            {
                "key_id": key.key_id,
                "purpose": key.purpose,
                "public_key": key.public_key,
                "created_unix_ms": key.created_unix_ms,
                "signing": key.signing,
            }
            for key in keys.signing_keys
        ],
    }


def _print_fingerprint(context: typer.Context, fingerprint: bytes, *, asked: bool) -> None:
    if asked or (isinstance(context.obj, Connection) and context.obj.json):
        print_json({"fingerprint": fingerprint})
    else:
        print_line(fingerprint.hex())
