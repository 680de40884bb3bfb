"""`holdfast app`: application data of tasks, which outlives every VM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_json, print_line, print_table
from holdfast.cli.points import report_transfer, transfer_json
from holdfast.cli.progress import shown
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import format_size

app = typer.Typer(help="Keep application data of tasks.")

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id that `app put` printed.")]


@app.command("put")
@on_cluster
def put(
    connection: Connection,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task that the data belongs to.")],
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="File to keep; - reads standard input.")],
) -> None:
    """Keep a file of any size; prints its id."""
    with connection.manager() as manager, shown(f"data of {task}") as progress:
        if file == "-":
            storage_id = manager.persist_stream(task, sys.stdin.buffer, progress=progress)
        else:
            try:
                source = Path(file).open("rb")  # noqa: SIM115  # its own errors are told apart from those of the call
            except OSError as error:
                raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"{file} cannot be read: {error.strerror}") from error
            with source:
                storage_id = manager.persist_stream(task, source, progress=progress)
        report_transfer(manager, storage_id)
        if connection.json:
            print_json(transfer_json(manager, {"storage_id": storage_id, "task_id": task}))
        else:
            print_line(storage_id)


@app.command("get")
@on_cluster
def get(
    connection: Connection,
    id: IdArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write; must not exist.")
    ] = None,
) -> None:
    """Write the data to a file, or to standard output."""
    with connection.manager() as manager:
        if output is not None:
            with shown(f"data {id}") as progress:
                manager.retrieve_to_file(id, output, progress=progress)
            return
        for piece in manager.retrieve_stream(id):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@app.command("list")
@on_cluster
def list_objects(
    connection: Connection, task: Annotated[str, typer.Argument(metavar="TASK", help="Task whose data to list.")]
) -> None:
    """List a task's data, oldest first."""
    with connection.manager() as manager:
        found = manager.list_application_data(task)
    if connection.json:
        print_json(found)
        return
    rows = [
        (
            item.storage_id,
            format_time(item.created_unix_ms),
            format_size(item.size_bytes),
            format_size(item.stats.stored_bytes),
        )
        for item in found
    ]
    print_table(("ID", "TIME", "SIZE", "STORED"), rows)


@app.command("forget")
@on_cluster
def forget(connection: Connection, id: IdArgument) -> None:
    """Forget data of a task."""
    with connection.manager() as manager:
        manager.forget_application_data(id)
    if connection.json:
        print_json({"forgotten": id})
