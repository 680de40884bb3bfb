"""`holdfast vm`: which VMs there are, and which volumes they have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_json, print_line, print_table
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import VOLUME_BLOCK_BYTES_DEFAULT
from holdfast_core.runtime.options import format_size, parse_size

if TYPE_CHECKING:
    from holdfast.results import VolumeSpec

app = typer.Typer(help="Register and list VMs.")


@app.command("register")
@on_cluster
def register(
    connection: Connection,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Name of the VM.")],
    volume: Annotated[
        list[str],
        typer.Option("--volume", metavar="NAME=URI", help="A volume and its source: a path or file: URI. Repeatable."),
    ],
    block_size: Annotated[
        list[str] | None,
        typer.Option(
            "--block-size", metavar="NAME=SIZE", help="Block size of a volume, 16KiB to 4MiB; 64KiB if not given."
        ),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option("--codec", metavar="NAME=CODEC", help="Compression of a volume: default, stored, lz4 or zstd."),
    ] = None,
    live: Annotated[
        list[str] | None,
        typer.Option("--live", metavar="NAME", help="The volume may change while it is read; such points are fuzzy."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a registration that differs.")] = False,
) -> None:
    """Register a VM and its volumes; the same again changes nothing."""
    volumes = parse_volumes(volume, block_sizes=block_size or (), codecs=codec or (), live=live or ())
    with connection.manager() as manager:
        info = manager.register_vm(vm, volumes, replace=replace)
    if connection.json:
        print_json(info)
    else:
        print_line(info.vm_id)


@app.command("list")
@on_cluster
def list_vms(connection: Connection) -> None:
    """List the registered VMs."""
    with connection.manager() as manager:
        vms = manager.list_vms()
    if connection.json:
        print_json(vms)
        return
    rows = [
        (
            vm.vm_id,
            name,
            str(spec.uri),
            format_size(spec.block_bytes),
            "live" if spec.live else "-",
            format_time(vm.created_unix_ms),
        )
        for vm in vms
        for name, spec in sorted(vm.volumes.items())
    ]
    print_table(("VM", "VOLUME", "SOURCE", "BLOCKS", "LIVE", "REGISTERED"), rows)


def parse_volumes(
    volumes: Sequence[str], *, block_sizes: Sequence[str], codecs: Sequence[str], live: Sequence[str]
) -> dict[str, VolumeSpec]:
    """Return the volumes that the options describe. Paths are made absolute: a later backup may start elsewhere.

    Raises:
        HoldfastError: INVALID_ARGUMENT for an option of another form, or one about a volume that is not given.
    """
    from holdfast.results import Codec, VolumeSpec

    uris = _pairs(volumes, "--volume", "NAME=URI")
    sizes = {name: parse_size(text) for name, text in _pairs(block_sizes, "--block-size", "NAME=SIZE").items()}
    words = _pairs(codecs, "--codec", "NAME=CODEC")
    for option, names in (("--block-size", sizes), ("--codec", words), ("--live", dict.fromkeys(live))):
        for name in names:
            if name not in uris:
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT, f"{option} names the volume {name!r}, which no --volume gives"
                )
    known = {codec.value: codec for codec in Codec}
    for word in words.values():
        if word not in known:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"there is no codec {word!r}; choose one of {', '.join(known)}"
            )
    return {
        name: VolumeSpec(
            uri=_absolute(uri),
            block_bytes=sizes.get(name, VOLUME_BLOCK_BYTES_DEFAULT),
            codec=known[words.get(name, Codec.DEFAULT.value)],
            live=name in live,
        )
        for name, uri in uris.items()
    }


def _pairs(texts: Sequence[str], option: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{option} {text!r} is incomplete; write {form}")
        if name in pairs:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{option} is given twice for {name!r}")
        pairs[name] = value
    return pairs


def _absolute(uri: str) -> str:
    """Return a path as an absolute one. Whatever has a scheme (letters before the first colon, no slash) stays."""
    scheme, colon, _ = uri.partition(":")
    if colon and scheme.replace("+", "").replace("-", "").isalnum():
        return uri
    return str(Path(uri).absolute())
