"""Weights as training leaves them: floats with the distribution of a normal one, in .safetensors and checkpoint files.

A float32 of a trained network has a sign and an exponent that compress a little and a mantissa that does not. The upper
half of each number is drawn from a normal distribution, the lower half is random, as it is in a real one.

The format is https://huggingface.co/docs/safetensors: eight bytes with the header's length, the header in JSON, the
tensors one after another. A checkpoint is a zip file of stored members, as PyTorch writes it.
"""

from __future__ import annotations

import json
import math
import random
import struct
import zipfile
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

FLOAT_BYTES: Final = 4
_DRAWN: Final = 1 << 16

Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors by their names."""


class Floats:
    """Draws little-endian float32 numbers."""

    def __init__(self, dice: random.Random) -> None:
        """Draw from `dice`."""
        self._dice = dice
        self._uppers: dict[tuple[float, bool], array[int]] = {}

    def normal(self, count: int, deviation: float, *, positive: bool = False) -> bytes:
        """Return `count` numbers around zero; their sizes alone if `positive`."""
        uppers = self._uppers.get((deviation, positive))
        if uppers is None:
            drawn = [self._dice.gauss(0.0, deviation) for _ in range(_DRAWN)]
            uppers = array("H", (_upper_half(abs(each) if positive else each) for each in drawn))
            self._uppers[deviation, positive] = uppers
        chosen = array("H", self._dice.randbytes(2 * count))
        halves = array("H", map(uppers.__getitem__, chosen)).tobytes()
        numbers = bytearray(FLOAT_BYTES * count)
        noise = self._dice.randbytes(2 * count)
        numbers[0::4], numbers[1::4] = noise[0::2], noise[1::2]
        numbers[2::4], numbers[3::4] = halves[0::2], halves[1::2]
        return bytes(numbers)


def network(parameters: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a transformer of about so many parameters."""
    width = 512
    layer = 12 * width * width
    layers = max(1, parameters // layer)
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layers):
        prefix = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (width, width)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (4 * width, width)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, 4 * width)
        shapes[f"{prefix}.norm.weight"] = (width,)
    return shapes


def count_of(shapes: Shapes) -> int:
    """Return how many numbers tensors have together."""
    return sum(math.prod(shape) for shape in shapes.values())


def safetensors(tensors: Mapping[str, bytes], shapes: Shapes) -> bytes:
    """Return a file of the format safetensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, content in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [at, at + len(content)]}
        at += len(content)
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    return struct.pack("<Q", len(packed)) + packed + b"".join(tensors.values())


def tensors_of(content: bytes) -> dict[str, bytes]:
    """Return the tensors of a file of the format safetensors.

    Raises:
        ValueError: it is none.
    """
    if len(content) < 8:
        raise ValueError("too short for a header")
    (length,) = struct.unpack_from("<Q", content)
    start = 8 + length
    header = json.loads(content[8:start])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if end - begin != FLOAT_BYTES * math.prod(entry["shape"]) or start + end > len(content):
                raise ValueError(f"{name} does not have its shape")
            found[name] = content[start + begin : start + end]
    return found


def draw(shapes: Shapes, floats: Floats, deviation: float, *, positive: bool = False) -> dict[str, bytes]:
    """Return numbers for all tensors."""
    return {name: floats.normal(math.prod(shape), deviation, positive=positive) for name, shape in shapes.items()}


def write_checkpoint(path: Path, shapes: Shapes, floats: Floats) -> None:
    """Write weights and an optimizer's two moments of each, as one zip file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
        for part, deviation, positive in (("model", 0.02, False), ("exp_avg", 1e-4, False), ("exp_avg_sq", 1e-8, True)):
            for name, content in draw(shapes, floats, deviation, positive=positive).items():
                packed.writestr(f"archive/{part}/{name}", content)


def _upper_half(number: float) -> int:
    upper: int = struct.unpack("<I", struct.pack("<f", number))[0] >> 16
    return upper
