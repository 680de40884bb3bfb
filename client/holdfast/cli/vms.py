"""`holdfast vm`: which VMs there are, what they have and carry, and the end of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_facts, print_json, print_line, print_table
from holdfast.cli.progress import shown
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import DEFINITION_BYTES_MAX, VOLUME_BLOCK_BYTES_DEFAULT
from holdfast_core.runtime.options import format_size, parse_size

if TYPE_CHECKING:
    from holdfast.lifecycle import DiscardReceipt, KeepRule
    from holdfast.results import VmInfo, VolumeSpec

app = typer.Typer(help="Register, list and discard VMs.")

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="Name of the VM.")]


VolumeOption = Annotated[
    list[str],
    typer.Option("--volume", metavar="NAME=URI", help="A volume and its source: a path or a URI. Repeatable."),
]
BlockSizeOption = Annotated[
    list[str] | None,
    typer.Option("--block-size", metavar="NAME=SIZE", help="Block size of a volume, 16KiB to 4MiB; 64KiB by default."),
]
CodecOption = Annotated[
    list[str] | None,
    typer.Option("--codec", metavar="NAME=CODEC", help="Compression of a volume: default, stored, lz4 or zstd."),
]
LiveOption = Annotated[
    list[str] | None,
    typer.Option("--live", metavar="NAME", help="The volume may change while it is read; such points are fuzzy."),
]
NoDeltaOption = Annotated[
    list[str] | None,
    typer.Option("--no-delta", metavar="NAME", help="Never code a changed block of the volume against its past."),
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="A label, kept with the VM and its points. Repeatable."),
]
DefinitionOption = Annotated[
    Path | None, typer.Option("--definition", metavar="FILE", help="What defines the VM; restored beside its volumes.")
]
TemplateOption = Annotated[
    str, typer.Option("--template", metavar="POINT", help="Point of any VM that snapshots are compared with.")
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", metavar="TASK=PATTERN", help="Files to keep for a task before the VM is discarded. Repeatable."
    ),
]
KeepExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--keep-exclude", metavar="TASK=PATTERN", help="Files not to keep for the task. Repeatable."),
]
KeepFromOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-from",
        metavar="TASK=VOLUME[/PARTITION]",
        help="Where the task's files are; the only volume and file system if not given.",
    ),
]
KeepNoSecretsOption = Annotated[
    bool, typer.Option("--keep-no-secrets", help="Keep no files that usually hold secrets, for any task.")
]


@app.command("register")
@on_cluster
def register(
    connection: Connection,
    vm: VmArgument,
    volume: VolumeOption,
    block_size: BlockSizeOption = None,
    codec: CodecOption = None,
    live: LiveOption = None,
    no_delta: NoDeltaOption = None,
    label: LabelOption = None,
    definition: DefinitionOption = None,
    template: TemplateOption = "",
    keep: KeepOption = None,
    keep_exclude: KeepExcludeOption = None,
    keep_from: KeepFromOption = None,
    keep_no_secrets: KeepNoSecretsOption = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a registration that differs, as a whole.")
    ] = False,
) -> None:
    """Register a VM and its volumes; the same again changes nothing."""
    volumes = parse_volumes(
        volume, block_sizes=block_size or (), codecs=codec or (), live=live or (), no_delta=no_delta or ()
    )
    rules = parse_keep(keep or (), exclude=keep_exclude or (), places=keep_from or (), exclude_secrets=keep_no_secrets)
    labels = _pairs(label or (), "--label", "NAME=VALUE", empty_value=True)
    content = None if definition is None else (_read_definition(definition), definition.name)
    with connection.manager() as manager:
        info = manager.register_vm(
            vm, volumes, replace=replace, labels=labels, definition=content, template=template, keep=rules
        )
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


@app.command("show")
@on_cluster
def show(connection: Connection, vm: VmArgument) -> None:
    """Show one VM: its volumes, and what it carries beside them."""
    with connection.manager() as manager:
        info = manager.vm(vm)
    if connection.json:
        print_json(info)
        return
    print_facts(_facts(info))
    for name, spec in sorted(info.volumes.items()):
        print_line(f"volume {name}: {spec.uri} in blocks of {format_size(spec.block_bytes)}")
    for rule in info.keep:
        place = f"{rule.volume}/{rule.partition}" if rule.partition else rule.volume
        without = f", without {' '.join(rule.exclude)}" if rule.exclude else ""
        secrets = ", without secrets" if rule.exclude_secrets else ""
        print_line(
            f"keep {rule.name} for the task {rule.task_id}: {' '.join(rule.include)} of {place}{without}{secrets}"
        )


@app.command("discard")
@on_cluster
def discard(connection: Connection, vm: VmArgument) -> None:
    """End a VM's life: store what it must keep, check that it is durable, discard its points; prints a receipt."""
    with connection.manager() as manager, shown(f"what {vm} must keep") as progress:
        receipt = manager.discard_vm(vm, progress=progress)
    if connection.json:
        print_json(receipt)
    else:
        _print_receipt(receipt)


def _facts(info: VmInfo) -> dict[str, str]:
    definition = f"{info.definition_name} ({format_size(len(info.definition))})" if info.definition_name else "-"
    return {
        "vm_id": info.vm_id,
        "registered": format_time(info.created_unix_ms),
        "labels": " ".join(f"{name}={value}" for name, value in sorted(info.labels.items())) or "-",
        "definition": definition,
        "template": info.template_id or "-",
        "retention": info.retention.text if info.retention else "keeps all points",
        "state": "being discarded" if info.discarding_unix_ms else "alive",
    }


def _print_receipt(receipt: DiscardReceipt) -> None:
    print_facts(
        {
            "discarded": receipt.vm_id,
            "time": format_time(receipt.discarded_unix_ms),
            "points": str(receipt.point_count),
            "newest": receipt.newest_point_id or "-",
            "released": format_size(receipt.released_bytes),
        }
    )
    for kept in receipt.kept:
        print_line(
            f"kept {kept.storage_id} for the task {kept.task_id}: {kept.file_count} entries, "
            f"{format_size(kept.size_bytes)}, {kept.durable_blocks} blocks durable"
        )


def parse_keep(
    keep: Sequence[str], *, exclude: Sequence[str], places: Sequence[str], exclude_secrets: bool
) -> list[KeepRule]:
    """Return the keep rules that the options describe: one a task, named after it.

    Raises:
        HoldfastError: INVALID_ARGUMENT for an option of another form, or one about a task that no --keep names.
    """
    from holdfast.lifecycle import KeepRule

    included = _lists(keep, "--keep")
    excluded = _lists(exclude, "--keep-exclude")
    volumes = _pairs(places, "--keep-from", "TASK=VOLUME[/PARTITION]")
    for option, tasks in (("--keep-exclude", excluded), ("--keep-from", volumes)):
        for task in tasks:
            if task not in included:
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT, f"{option} names the task {task!r}, which no --keep names"
                )
    rules = []
    for task, patterns in included.items():
        volume, slash, number = volumes.get(task, "").partition("/")
        if slash and not (number.isascii() and number.isdigit() and len(number) <= len("1024")):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"--keep-from names the partition {number!r}; count from 1")
        rules.append(
            KeepRule(
                name=task,
                task_id=task,
                include=patterns,
                exclude=excluded.get(task, ()),
                exclude_secrets=exclude_secrets,
                volume=volume,
                partition=int(number or 0),
            )
        )
    if exclude_secrets and not rules:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, "--keep-no-secrets is about what --keep names, and none is given"
        )
    return rules


def _read_definition(path: Path) -> bytes:
    """Return a file's bytes, one more than are allowed at most: then the refusal says so."""
    try:
        with path.open("rb") as file:
            return file.read(DEFINITION_BYTES_MAX + 1)
    except OSError as error:
        raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"{path} cannot be read: {error.strerror}") from error


def _lists(texts: Sequence[str], option: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        for name, value in _pairs([text], option, "TASK=PATTERN").items():
            found.setdefault(name, []).append(value)
    return found


def parse_volumes(
    volumes: Sequence[str],
    *,
    block_sizes: Sequence[str],
    codecs: Sequence[str],
    live: Sequence[str],
    no_delta: Sequence[str] = (),
) -> dict[str, VolumeSpec]:
    """Return the volumes that the options describe. Paths are made absolute: a later backup may start elsewhere.

    Raises:
        HoldfastError: INVALID_ARGUMENT for an option of another form, or one about a volume that is not given.
    """
    from holdfast.results import Codec, VolumeSpec

    uris = _pairs(volumes, "--volume", "NAME=URI")
    sizes = {name: parse_size(text) for name, text in _pairs(block_sizes, "--block-size", "NAME=SIZE").items()}
    words = _pairs(codecs, "--codec", "NAME=CODEC")
    for option, names in (
        ("--block-size", sizes),
        ("--codec", words),
        ("--live", dict.fromkeys(live)),
        ("--no-delta", dict.fromkeys(no_delta)),
    ):
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
            delta=name not in no_delta,
        )
        for name, uri in uris.items()
    }


def _pairs(texts: Sequence[str], option: str, form: str, *, empty_value: bool = False) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and (value or empty_value)):
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
