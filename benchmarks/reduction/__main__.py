"""`make bench-reduction`: build real data, store it, and print how much Holdfast does not keep, row by row."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import this_machine
from benchmarks.packages import Package, installed_packages
from benchmarks.reduction.changes import Working, measure_changes
from benchmarks.reduction.clones import Clones, measure_clones
from benchmarks.reduction.databases import Accounts, Database, LmdbBank, SqliteBank
from benchmarks.reduction.disks import Template, build_template
from benchmarks.reduction.rows import Row, details, record, summary
from benchmarks.reduction.texts import machine_texts, measure_texts
from benchmarks.reduction.training import Training, measure_training

MB: Final = 1_000_000
MIB: Final = 1024 * 1024
_ROWS: Final = ("templates", "text", "sqlite", "lmdb", "selection")
_DISK_BYTES: Final = 3 * 1024 * MIB
_TEMPLATE_BYTES: Final = 360 * MB
# Where only what changes is counted, a smaller disk gives the same figures sooner.
_SMALL_BYTES: Final = 60 * MB
_OTHERS_BYTES: Final = 240 * MB
_TEXT_BYTES: Final = 24 * MB
_DATABASE_BYTES: Final = 80 * MIB
_DPKG_INFO: Final = Path("/var/lib/dpkg/info")
_LOGS: Final = Path("/var/log")


def main() -> None:
    """Run what the command line asks for."""
    arguments = _parse()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.monotonic()
    rows = measure(arguments.rows, work)
    shutil.rmtree(work)
    machine = this_machine()
    _say(f"\n{machine.processor}, {machine.cores} cores; {machine.system}; {time.monotonic() - started:.0f} s\n")
    _say(summary(rows) + "\n")
    for row in rows:
        _say(details(row) + "\n")
    result: dict[str, Any] = {"machine": asdict(machine), "rows": [record(row) for row in rows]}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    _say(f"kept as {arguments.json}")


def measure(names: Sequence[str], work: Path) -> list[Row]:
    """Measure the rows that are named, in `work`, which is there and empty."""
    packages = list(installed_packages())
    templates: dict[int, Template] = {}
    rows = []
    for name in names:
        started = time.monotonic()
        _say(f"{name}:")
        filled_bytes, measured = _MEASURES[name]
        if filled_bytes not in templates:
            templates[filled_bytes] = _template(work / f"template-{filled_bytes}", packages, filled_bytes)
        rows.append(measured(templates[filled_bytes], packages, work / name))
        shutil.rmtree(work / name)
        _say(f"  {rows[-1].figure.saved:.1%} in {time.monotonic() - started:.0f} s")
    return rows


def _template(folder: Path, packages: Sequence[Package], filled_bytes: int) -> Template:
    _say(f"  a template disk with {filled_bytes / 1e6:.0f} MB of this machine's package files")
    folder.mkdir()
    return build_template(
        folder, packages, size_bytes=_DISK_BYTES, filled_bytes=filled_bytes, others_bytes=_OTHERS_BYTES
    )


def _templates(template: Template, _: Sequence[Package], work: Path) -> Row:
    return measure_clones(template, Clones(), work=work, say=_say)


def _text(_: Template, packages: Sequence[Package], work: Path) -> Row:
    kinds = machine_texts(packages, info=_DPKG_INFO, logs=_LOGS)
    return measure_texts(kinds, each_bytes=_TEXT_BYTES, work=work, say=_say)


def _changes(make: Callable[[Path, int, Accounts], Database]) -> Callable[[Template, Sequence[Package], Path], Row]:
    def measured(template: Template, packages: Sequence[Package], work: Path) -> Row:
        words = [package.name.partition(":")[0] for package in packages]
        folder = work.with_name(f"{work.name}-database")
        database = make(folder, _DATABASE_BYTES, Accounts(random.Random(_DATABASE_BYTES), words))
        try:
            return measure_changes(template, database, Working(), work=work, say=_say)
        finally:
            database.close()
            shutil.rmtree(folder)

    return measured


def _selection(template: Template, packages: Sequence[Package], work: Path) -> Row:
    texts = machine_texts(packages, info=_DPKG_INFO, logs=_LOGS)["source text"]
    return measure_training(template, Training(), texts(), work=work, say=_say)


_MEASURES: Final[dict[str, tuple[int, Callable[[Template, Sequence[Package], Path], Row]]]] = {
    "templates": (_TEMPLATE_BYTES, _templates),
    "text": (_TEMPLATE_BYTES, _text),
    "sqlite": (_SMALL_BYTES, _changes(SqliteBank)),
    "lmdb": (_SMALL_BYTES, _changes(LmdbBank)),
    "selection": (_TEMPLATE_BYTES, _selection),
}
"""What measures a row, on copies of a template with so many bytes of files."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-reduction", description=__doc__)
    parser.add_argument(
        "--rows",
        type=_rows,
        default=_ROWS,
        help=f"rows, separated by commas, out of {', '.join(_ROWS)} (default: all)",
    )
    parser.add_argument("--json", type=Path, default=Path(".bench/reduction.json"), help="file for the figures")
    parser.add_argument("--work", type=Path, default=Path(".bench/reduction"), help="folder that is made and removed")
    return parser.parse_args()


def _rows(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in _ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(_ROWS)}")
    return names


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
