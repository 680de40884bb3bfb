"""`python -m tests.sim`: many histories, or one with its trace."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.machine import this_machine
from tests.sim.history import Outcome, draw_plan, run_history

_CHUNK: Final = 20
_SHOWN: Final = 3


def main() -> int:
    """Run what the arguments say; return 1 if an invariant broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many histories")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="one history alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures of many histories go")
    said = parser.parse_args()
    if said.seed is not None:
        return _one(said.seed, trace=said.trace)
    return _many(said.first, said.seeds, said.jobs, said.json)


def _one(seed: int, *, trace: bool) -> int:
    plan = draw_plan(seed)
    print(plan)
    outcome = run_history(plan, show=print if trace else None)
    print(
        f"seed {seed}: {outcome.time_s:.0f} s of virtual time, {outcome.steps} steps, {outcome.committed} commits, "
        f"{outcome.faults} faults, trace {outcome.digest}"
    )
    _tell(outcome)
    return 1 if outcome.violations else 0


def _many(first: int, count: int, jobs: int, figures: Path | None) -> int:
    began_s = time.monotonic()
    chunks = [range(at, min(at + _CHUNK, first + count)) for at in range(first, first + count, _CHUNK)]
    committed = faults = 0
    failed: list[int] = []
    for done, outcome in enumerate(_outcomes(chunks, jobs), start=1):
        committed += outcome.committed
        faults += outcome.faults
        if outcome.violations:
            failed.append(outcome.seed)
            _tell(outcome)
        if done % 100 == 0 or done == count:
            per_s = done / (time.monotonic() - began_s)
            print(
                f"{done} of {count} histories, {per_s:.1f} a second, {committed} commits, {faults} faults, "
                f"{len(failed)} failed",
                flush=True,
            )
    if failed:
        print(f"failed: {' '.join(map(str, failed))}")
    if figures is not None:
        result = {
            "machine": asdict(this_machine()),
            "first_seed": first,
            "histories": count,
            "commits": committed,
            "faults": faults,
            "failed_seeds": failed,
            "jobs": jobs,
            "seconds": round(time.monotonic() - began_s, 1),
        }
        figures.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


def _outcomes(chunks: list[range], jobs: int) -> Iterator[Outcome]:
    if jobs <= 1:
        for chunk in chunks:
            yield from map(_outcome, chunk)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for outcomes in pool.map(_chunk, chunks):
            yield from outcomes


def _chunk(seeds: range) -> list[Outcome]:
    return list(map(_outcome, seeds))


def _outcome(seed: int) -> Outcome:
    return run_history(draw_plan(seed))


def _tell(outcome: Outcome) -> None:
    for violation in islice(outcome.violations, _SHOWN):
        print(f"seed {outcome.seed}: {violation}")
    if outcome.violations:
        print(f"    replay: python -m tests.sim --seed {outcome.seed} --trace", flush=True)


if __name__ == "__main__":
    sys.exit(main())
