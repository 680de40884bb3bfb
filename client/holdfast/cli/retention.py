"""How long points stay: `holdfast lock`, `unlock` and `retention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_json, print_line, print_table
from holdfast.cli.times import parse_end

if TYPE_CHECKING:
    from holdfast import RetainedPoint, RetentionRules

app = typer.Typer()
retention_app = typer.Typer(help="Say which points of a VM are kept, and forget the others.")

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of a snapshot or backup.")]
VmArgument = Annotated[str, typer.Argument(metavar="VM", help="Name of the VM.")]
LastOption = Annotated[int, typer.Option("--keep-last", metavar="N", min=0, help="Keep the newest N points.")]
HourlyOption = Annotated[
    int, typer.Option("--keep-hourly", metavar="N", min=0, help="Keep the newest point of each of N hours.")
]
DailyOption = Annotated[
    int, typer.Option("--keep-daily", metavar="N", min=0, help="Keep the newest point of each of N days.")
]
WeeklyOption = Annotated[
    int, typer.Option("--keep-weekly", metavar="N", min=0, help="Keep the newest point of each of N weeks.")
]
MonthlyOption = Annotated[
    int, typer.Option("--keep-monthly", metavar="N", min=0, help="Keep the newest point of each of N months.")
]
YearlyOption = Annotated[
    int, typer.Option("--keep-yearly", metavar="N", min=0, help="Keep the newest point of each of N years.")
]


@app.command("lock")
@on_cluster
def lock(
    connection: Connection,
    id: IdArgument,
    until: Annotated[
        str,
        typer.Option("--until", metavar="WHEN", help="Date or time in UTC, or a duration from now: 12h, 30d, 6w, 1y."),
    ],
) -> None:
    """Keep a recovery point from being forgotten until then; a lock is only ever made longer."""
    end = parse_end(until)
    with connection.manager() as manager:
        held = manager.lock(id, end)
    if connection.json:
        print_json(held)
    else:
        print_line(f"{id} is locked until {format_time(held.until_unix_ms)}")


@app.command("unlock")
@on_cluster
def unlock(connection: Connection, id: IdArgument) -> None:
    """Lift a lock before its end; for administrators."""
    with connection.manager() as manager:
        manager.unlock(id)
    if connection.json:
        print_json({"unlocked": id})


@retention_app.command("set")
@on_cluster
def set_rules(
    connection: Connection,
    vm: VmArgument,
    last: LastOption = 0,
    hourly: HourlyOption = 0,
    daily: DailyOption = 0,
    weekly: WeeklyOption = 0,
    monthly: MonthlyOption = 0,
    yearly: YearlyOption = 0,
    none: Annotated[bool, typer.Option("--none", help="Remove the rules: all points are kept.")] = False,
) -> None:
    """Keep a VM's points by these rules from now on; the cluster applies them every hour."""
    rules = _rules(last, hourly, daily, weekly, monthly, yearly)
    if none == (rules is not None):
        raise typer.BadParameter("give rules, as --keep-daily 7, or --none to keep everything")
    with connection.manager() as manager:
        manager.set_retention(vm, rules)
    if connection.json:
        print_json({"vm_id": vm, "retention": rules})


@retention_app.command("show")
@on_cluster
def show(connection: Connection, vm: VmArgument) -> None:
    """Show a VM's rules."""
    with connection.manager() as manager:
        rules = manager.vm(vm).retention
    if connection.json:
        print_json({"vm_id": vm, "retention": rules})
    elif rules is None:
        print_line(f"{vm} has no rules; all its points are kept")
    else:
        print_line(rules.text)


@retention_app.command("apply")
@on_cluster
def apply(
    connection: Connection,
    vm: VmArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be forgotten.")] = False,
    last: LastOption = 0,
    hourly: HourlyOption = 0,
    daily: DailyOption = 0,
    weekly: WeeklyOption = 0,
    monthly: MonthlyOption = 0,
    yearly: YearlyOption = 0,
) -> None:
    """Forget the points that rules do not keep: those given, or else the VM's own."""
    rules = _rules(last, hourly, daily, weekly, monthly, yearly)
    with connection.manager() as manager:
        points = manager.apply_retention(vm, rules=rules, dry_run=dry_run)
    if connection.json:
        print_json(points)
        return
    rows = [(point.point_id, format_time(point.created_unix_ms), _state(point), _why(point)) for point in points]
    print_table(("ID", "TIME", "STATE", "WHY"), rows)


def _rules(last: int, hourly: int, daily: int, weekly: int, monthly: int, yearly: int) -> RetentionRules | None:
    # Imported here: it brings gRPC, which `--help` need not wait for.
    from holdfast import RetentionRules

    if not any((last, hourly, daily, weekly, monthly, yearly)):
        return None
    return RetentionRules(
        keep_last=last,
        keep_hourly=hourly,
        keep_daily=daily,
        keep_weekly=weekly,
        keep_monthly=monthly,
        keep_yearly=yearly,
    )


def _state(point: RetainedPoint) -> str:
    if point.reasons:
        return "kept"
    return "forgotten" if point.forgotten else "goes"


def _why(point: RetainedPoint) -> str:
    return ", ".join(point.reasons) or "-"
