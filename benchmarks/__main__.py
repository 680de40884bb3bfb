"""`make bench`, or `python -m benchmarks`: build the images, compare, print tables and ratios, keep the JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import report
from benchmarks.codec import measure_codecs, sample_blocks
from benchmarks.compare import compare
from benchmarks.contenders.base import Contender
from benchmarks.contenders.borg import Borg, borg_version
from benchmarks.contenders.holdfast import Holdfast
from benchmarks.contenders.restic import Restic, restic_version
from benchmarks.goals import judge
from benchmarks.image import MIB, ImageSet, load_or_build
from benchmarks.machine import this_machine
from benchmarks.security import costs, measure_security
from benchmarks.stages import cpu_sum_s, measure_stages, scaled
from holdfast_core.model.block import Codec

_CONTENDERS: Final[dict[str, Callable[[], Contender]]] = {
    "restic": Restic,
    "borg-tuned": lambda: Borg(tuned=True),
    "borg": lambda: Borg(tuned=False),
    "holdfast-1": lambda: Holdfast(nodes=1),
    "holdfast-3": lambda: Holdfast(nodes=3),
    "holdfast-1-lz4": lambda: Holdfast(nodes=1, codec="lz4"),
    "holdfast-3-lz4": lambda: Holdfast(nodes=3, codec="lz4"),
    "holdfast-1-zstd": lambda: Holdfast(nodes=1, codec="zstd"),
    "holdfast-3-zstd": lambda: Holdfast(nodes=3, codec="zstd"),
}
_USUAL: Final = ("restic", "borg-tuned", "borg", "holdfast-1", "holdfast-3")
_PARTS: Final = ("compare", "codecs", "stages", "security")
_USUAL_PARTS: Final = ("compare", "codecs", "stages")
_SAMPLE_EVERY: Final = 4


def main() -> None:
    """Run what the command line asks for."""
    arguments = _parse()
    # Each start would compile every module again, which no installed program does, the peers included.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    cache = arguments.cache.resolve()
    images = load_or_build(cache, size_bytes=int(arguments.size * 1024) * MIB, say=_say)
    machine = this_machine()
    result: dict[str, Any] = {"machine": asdict(machine), "image": _image_facts(images)}
    _say(f"\n{machine.processor}, {machine.cores} cores; {machine.system}; {machine.versions}\n")
    _say(report.image_table(images) + "\n")
    if "codecs" in arguments.only:
        result["codecs"] = _codecs(images)
    if "stages" in arguments.only:
        result["stages"] = _stages(images, cache, Codec[arguments.stage_codec.upper()])
    if "compare" in arguments.only:
        result |= _compare(images, cache, _present(arguments.peers), arguments.runs)
    if "security" in arguments.only:
        result["security"] = _security(images, cache, arguments.runs)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        _say(f"kept as {arguments.json}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--size", type=float, default=4.0, help="size of the disk image in GiB (default 4)")
    parser.add_argument("--runs", type=int, default=3, help="turns of each program; medians are taken (default 3)")
    parser.add_argument(
        "--peers",
        type=_list_of(tuple(_CONTENDERS)),
        default=_USUAL,
        help=f"programs, separated by commas, out of {', '.join(_CONTENDERS)} (default {','.join(_USUAL)})",
    )
    parser.add_argument(
        "--only",
        type=_list_of(_PARTS),
        default=_USUAL_PARTS,
        help=f"parts, separated by commas, out of {', '.join(_PARTS)} (default {','.join(_USUAL_PARTS)})",
    )
    parser.add_argument("--json", type=Path, default=Path(".bench/latest.json"), help="file for the figures")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="folder for images and working files")
    parser.add_argument("--stage-codec", default="zstd", choices=["stored", "lz4", "zstd"])
    return parser.parse_args()


def _list_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def split(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return split


def _present(wanted: Sequence[str]) -> list[Callable[[], Contender]]:
    missing = {
        name
        for name, version in (("restic", restic_version()), ("borg", borg_version()))
        if version is None and any(each.startswith(name) for each in wanted)
    }
    for name in sorted(missing):
        package = "borgbackup" if name == "borg" else name
        _say(f"{name} is not installed and is left out; `apt-get install {package}` brings it")
    return [_CONTENDERS[name] for name in wanted if name.partition("-")[0] not in missing]


def _codecs(images: ImageSet) -> list[dict[str, Any]]:
    figures = measure_codecs(sample_blocks(images.path(0), every=_SAMPLE_EVERY))
    _say(f"Codecs, one core, every {_SAMPLE_EVERY}th block of 64 KiB:\n\n{report.codec_table(figures)}\n")
    return [asdict(each) for each in figures]


def _stages(images: ImageSet, cache: Path, codec: Codec) -> dict[str, Any]:
    blocks = sample_blocks(images.path(0), every=_SAMPLE_EVERY)
    factor = images.days[0].data_bytes / sum(len(block) for block in blocks)
    figures = scaled(measure_stages(images.path(0), cache, blocks, codec), factor)
    sums = {copies: cpu_sum_s(figures, copies=copies) for copies in (1, 3)}
    cores = this_machine().cores
    _say(f"Stages of a first snapshot with {codec.name}, reckoned up to the whole image:\n")
    _say(report.stage_table(figures) + "\n")
    for copies, seconds in sums.items():
        _say(f"copies {copies}: {seconds:.1f} CPU s, so {seconds / cores:.1f} s where {cores} cores work all the time")
    return {"codec": codec.name, "stages": [asdict(each) for each in figures], "cpu_s_by_copies": sums}


def _compare(images: ImageSet, cache: Path, make: Sequence[Callable[[], Contender]], runs: int) -> dict[str, Any]:
    turns = compare(images, make, work=cache / "work", runs=runs, say=_say)
    verdicts = judge(turns)
    _say(f"\nMedians of {runs} runs:\n\n{report.steps_table(turns)}\n\n{report.disk_line(turns)}\n")
    _say(report.goals_table(verdicts) + "\n")
    return {"turns": [asdict(turn) for turn in turns], "goals": [asdict(verdict) for verdict in verdicts]}


def _security(images: ImageSet, cache: Path, runs: int) -> dict[str, Any]:
    turns = measure_security(images, work=cache / "work", runs=runs, say=_say)
    found = costs(turns)
    _say(f"\nWhat security costs, medians of {runs} runs:\n\n{report.security_table(turns, found)}\n")
    return {"turns": [asdict(turn) for turn in turns], "costs": [asdict(cost) for cost in found]}


def _image_facts(images: ImageSet) -> dict[str, Any]:
    facts = asdict(images)
    del facts["folder"]
    return facts


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
