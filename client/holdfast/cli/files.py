"""`holdfast files`: sets of files that outlive every VM, and the files inside recovery points."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.exits import say
from holdfast.cli.output import format_time, print_json, print_line, print_table, to_json
from holdfast.cli.points import report_transfer, transfer_json
from holdfast.cli.progress import shown
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast import FileInfo

app = typer.Typer(help="Keep files, and fetch files of recovery points.")

_TYPES: Final = {
    "file": "-",
    "directory": "d",
    "symbolic link": "l",
    "hard link": "h",
    "fifo": "p",
    "character device": "c",
    "block device": "b",
}

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of a set of files, a snapshot or a backup.")]
IncludeOption = Annotated[
    list[str] | None, typer.Option("--include", metavar="PATTERN", help="What to take, as in .gitignore; repeatable.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="What to leave out; repeatable.")
]
VolumeOption = Annotated[
    str, typer.Option("--volume", metavar="NAME", help="Volume of the recovery point; the first if not given.")
]
PartitionOption = Annotated[
    int,
    typer.Option(
        "--partition", metavar="NUMBER", min=0, help="Partition of the volume; finds the only file system if not given."
    ),
]


@app.command("put")
@on_cluster
def put(
    connection: Connection,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task that the files belong to.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory whose files to keep; or give --point.")
    ] = None,
    point: Annotated[
        str, typer.Option("--point", metavar="ID", help="Keep files of this snapshot or backup instead.")
    ] = "",
    volume: VolumeOption = "",
    partition: PartitionOption = 0,
    root: Annotated[str, typer.Option("--root", metavar="PATH", help="Directory inside the volume to begin at.")] = "/",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    no_secrets: Annotated[
        bool, typer.Option("--no-secrets", help="Leave out files that usually hold secrets.")
    ] = False,
) -> None:
    """Keep files of a directory, or out of a recovery point, as one set; prints its id."""
    from holdfast import PointFiles

    if (directory is None) == (not point):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "say what to keep: a directory, or a recovery point by --point")
    if directory is not None and (volume or partition or root != "/"):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "--volume, --partition and --root belong to --point")
    source = PointFiles(point, volume, partition, root) if directory is None else directory
    with connection.manager() as manager, shown(f"files of {task}") as progress:
        storage_id = manager.persist_files(
            task,
            source,
            include=include or (),
            exclude=exclude or (),
            exclude_secrets=no_secrets,
            progress=progress,
        )
        report_transfer(manager, storage_id)
        if connection.json:
            print_json(transfer_json(manager, {"storage_id": storage_id, "task_id": task}))
        else:
            print_line(storage_id)


@app.command("ls")
@on_cluster
def list_files(
    connection: Connection,
    id: IdArgument,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Directory or file; the root if not given.")] = "",
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="What is in directories below too.")] = False,
    volume: VolumeOption = "",
    partition: PartitionOption = 0,
) -> None:
    """List files of a set, or inside a recovery point."""
    with connection.manager() as manager:
        found = manager.list_files(id, path, recursive=recursive, volume=volume, partition=partition)
    if connection.json:
        print_json([_json(each) for each in found])
        return
    rows = [
        (
            _TYPES[each.kind.value] + f"{each.mode:04o}",
            f"{each.uid}:{each.gid}",
            format_size(each.size_bytes) if each.kind.value == "file" else "-",
            format_time(each.mtime_ns // 1_000_000),
            _printable(each.path) + (f" -> {_printable(each.target)}" if each.target else ""),
        )
        for each in found
    ]
    print_table(("MODE", "OWNER", "SIZE", "CHANGED", "PATH"), rows)


@app.command("get")
@on_cluster
def get(
    connection: Connection,
    id: IdArgument,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH", help="Files or directories; everything if not given.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Directory to write into; nothing in it is replaced.")
    ] = None,
    output: Annotated[
        bool, typer.Option("--stdout", help="Write the content of the one file named to standard output instead.")
    ] = False,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    volume: VolumeOption = "",
    partition: PartitionOption = 0,
    durable: Annotated[bool, typer.Option("--durable", help="Return only when the files are on the disk.")] = False,
) -> None:
    """Fetch files of a set, or out of a recovery point."""
    if (to is None) == (not output):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "say where the files go: --to DIR, or --stdout for one file")
    with connection.manager() as manager:
        if to is None:
            if not paths or len(paths) != 1 or include or exclude:
                raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "--stdout takes exactly one path and no patterns")
            sys.stdout.buffer.write(manager.read_file(id, paths[0], volume=volume, partition=partition))
            sys.stdout.buffer.flush()
            return
        with shown(f"files of {id}") as progress:
            result = manager.retrieve_files(
                id,
                to,
                paths=paths or (),
                include=include or (),
                exclude=exclude or (),
                volume=volume,
                partition=partition,
                durable=durable,
                progress=progress,
            )
    for path in result.left_out:
        say(f"left out: {_printable(path)} is a device, which only root may make")
    if connection.json:
        print_json(result)
        return
    print_line(f"{result.file_count} files, {format_size(result.data_bytes)}, in {result.target}")


def _printable(path: str) -> str:
    """Return a path for people: what a terminal would act on, or cannot show, is escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in path)


def _json(file: FileInfo) -> dict[str, Any]:
    """Return a file as JSON can hold it: names may be any bytes, so the exact ones stand beside the text."""
    texts = {"path": file.path, "target": file.target}
    shown = {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}
    exact = {f"{name}_bytes": os.fsencode(text).hex() for name, text in texts.items()}
    return {**to_json(file), **shown, **exact}
