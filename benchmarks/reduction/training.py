"""Selective persistence: of a machine learning task's disk, only the final weights outlive the VM."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from benchmarks.reduction.cluster import WrongBytes, allocated_bytes, fresh_cluster, last_stats, on_disk_bytes
from benchmarks.reduction.disks import Content, Template, copy_sparse, put_files
from benchmarks.reduction.rows import SELECTION, Row, Share
from benchmarks.reduction.tensors import Floats, count_of, draw, network, safetensors, write_checkpoint
from benchmarks.reduction.texts import cut
from holdfast.files.results import PointFiles
from holdfast.results import TransferStats

MB: Final = 1_000_000
PATTERN: Final = "**/*.safetensors"
_TASK: Final = PurePosixPath("/home/task")
_WEIGHTS: Final = _TASK / "final" / "model.safetensors"
_RECORD_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Training:
    """A task: how large its network is, and what it leaves on its disk.

    Attributes:
        parameters: of the network, four bytes each.
        checkpoints: each with the weights and two moments of the optimizer.
        dataset_bytes: text that it is trained with.
    """

    parameters: int = 6_300_000
    checkpoints: int = 4
    dataset_bytes: int = 128 * MB


def measure_training(
    template: Template, plan: Training, dataset: Iterator[bytes], *, work: Path, say: Callable[[str], None]
) -> Row:
    """Save a task's disk, and keep the weights out of the recovery point.

    Raises:
        benchmarks.reduction.cluster.WrongBytes: the weights were not read back as they were written.
    """
    work.mkdir()
    image = work / "task.img"
    copy_sparse(template.image, image)
    weights = fill_disk(image, template, plan, dataset, work)
    with fresh_cluster(work / "cluster") as manager:
        manager.register_vm("task", {"disk": image})
        point_id = manager.create_snapshot("task")
        saved, allocated = last_stats(manager), allocated_bytes(manager, point_id)
        storage_id = manager.persist_files("task", PointFiles(point_id), include=[PATTERN])
        kept, size = last_stats(manager), manager.application_data(storage_id).size_bytes
        listed = [each.path for each in manager.list_files(storage_id, recursive=True) if each.size_bytes]
        say(f"  kept {', '.join(listed)} of a disk with {allocated / 1e6:.0f} MB")
        read = manager.read_file(storage_id, str(_WEIGHTS.relative_to("/")))
        if hashlib.sha256(read).digest() != weights or listed != [str(_WEIGHTS.relative_to("/"))]:
            raise WrongBytes("the weights were not read back as they were written")
    return training_row(saved, kept, plan, kept_size=size, allocated=allocated, disk=on_disk_bytes(work / "cluster"))


def training_row(
    saved: TransferStats, kept: TransferStats, plan: Training, *, kept_size: int, allocated: int, disk: int
) -> Row:
    """Return the row of a disk that was saved, and of the files that are kept out of it."""
    return Row(
        name="selective persistence, ML task",
        goal=SELECTION,
        workload=(
            f"Debian disk (ext4) with {plan.dataset_bytes / 1e6:.0f} MB of dataset and {plan.checkpoints} checkpoints "
            f"of a network of {count_of(network(plan.parameters)) / 1e6:.1f} million float32 parameters with an "
            f"optimizer's two moments; `persist_files` of {PATTERN} from the recovery point"
        ),
        formula="1 - bytes of the kept set of files / plaintext of the disk's allocated blocks",
        figure=Share("plaintext", kept_size, allocated),
        beside=(
            Share("sealed bytes over the same", kept.stored_bytes, allocated),
            Share("sealed bytes kept over those of the whole disk", kept.stored_bytes, saved.stored_bytes),
        ),
        facts={
            "sealed bytes of the whole disk": saved.stored_bytes,
            "bytes on the node's disk, point included": disk,
        },
    )


def fill_disk(image: Path, template: Template, plan: Training, dataset: Iterator[bytes], work: Path) -> bytes:
    """Write what the task leaves into a copy of the template; returns the SHA-256 of the final weights."""
    dice = random.Random(plan.parameters)
    floats = Floats(dice)
    shapes = network(plan.parameters)
    scratch = work / "files"
    scratch.mkdir()
    files: dict[PurePosixPath, Content] = {}
    shard = scratch / "dataset.jsonl"
    with open(shard, "wb") as out:
        out.writelines(cut(_records(dataset), plan.dataset_bytes))
    files[_TASK / "data" / "train-00000.jsonl"] = shard
    for number in range(plan.checkpoints):
        path = scratch / f"step-{number}.pt"
        write_checkpoint(path, shapes, floats)
        files[_TASK / "checkpoints" / f"step-{(number + 1) * 500:05}.pt"] = path
    weights = safetensors(draw(shapes, floats, 0.02), shapes)
    files[_WEIGHTS] = weights
    files[_WEIGHTS.with_name("config.json")] = json.dumps({"hidden_size": 512, "torch_dtype": "float32"}).encode()
    files[_TASK / "train.log"] = "".join(
        f"step {step} loss {2.5 / (1 + step / 400) + dice.gauss(0, 0.02):.4f} lr {3e-4 * (1 - step / 2001):.6f}\n"
        for step in range(2000)
    ).encode()
    put_files(image, files, there=template.places, scratch=work / "scratch")
    for path in scratch.iterdir():
        path.unlink()
    return hashlib.sha256(weights).digest()


def _records(texts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines of JSON with a text of a few kilobytes each, as training data is handed around."""
    number = 0
    for text in texts:
        for at in range(0, len(text), _RECORD_BYTES):
            record = {"id": number, "text": text[at : at + _RECORD_BYTES].decode(errors="replace")}
            yield json.dumps(record).encode() + b"\n"
            number += 1
