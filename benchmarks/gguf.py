"""Files in GGUF, as llama.cpp reads them: their metadata, and their tensors as float32.

The format and its blocks are defined in ggml: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
and `ggml-common.h`. Only what the models of `real_models` hold is read.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.errors import ModelError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# number of a metadata type → its code in `struct`
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # numbers that share a scale, in every quantized kind read here


def _floats(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4").astype(np.float32)


def _halves(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _field(blocks: np.ndarray, start: int) -> np.ndarray:
    """Return the half that begins at a byte of every block, shape (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Return 32 numbers of 4 bits: the low halves of the 16 bytes are the first 16."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _field(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _field(blocks, 0) * _nibbles(blocks[:, 4:]) + _field(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _field(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


@dataclass(frozen=True)
class _Kind:
    """How a tensor's bytes are read: `count` numbers lie in `size` bytes."""

    count: int
    size: int
    read: Callable[[np.ndarray], np.ndarray]  # (blocks, size) bytes → (blocks, count)


_KINDS = {
    0: _Kind(1, 4, _floats),
    1: _Kind(1, 2, _halves),
    2: _Kind(_BLOCK, 18, _q4_0),
    3: _Kind(_BLOCK, 20, _q4_1),
    8: _Kind(_BLOCK, 34, _q8_0),
}


@dataclass(frozen=True)
class Gguf:
    """What a file holds."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]  # float32, rows first, as PyTorch has them


def dequantize(content: bytes | np.ndarray, kind: int, where: str = "the tensor") -> np.ndarray:
    """Return the numbers of a tensor's bytes, flat.

    Raises `ModelError` for a kind that is not read here, or where the last block is cut short.
    """
    if kind not in _KINDS:
        raise ModelError(f"{where} is stored as ggml type {kind}; only {sorted(_KINDS)} are read")
    how, raw = _KINDS[kind], np.frombuffer(content, np.uint8)
    if raw.size % how.size:
        raise ModelError(f"{where} ends within a block: {raw.size} bytes, {how.size} in each")
    return how.read(raw.reshape(-1, how.size)).reshape(-1)


class _Reader:
    """Reads little-endian values one after another."""

    def __init__(self, content: bytes, path: Path) -> None:
        self._content, self._path, self.at = content, path, 0

    def take(self, size: int) -> bytes:
        found = self._content[self.at : self.at + size]
        if len(found) != size:
            raise ModelError(f"{self._path} is cut short: {size} bytes wanted at {self.at}")
        self.at += size
        return found

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(f"{self._path} has a value of the unknown type {kind}")
        return self.number(_SCALARS[kind])


def read_gguf(path: Path) -> Gguf:
    """Return what a GGUF file holds. Raises `ModelError` where it is not one, or is cut short."""
    reader = _Reader(path.read_bytes(), path)
    if reader.take(4) != _MAGIC or reader.number("I") not in _VERSIONS:
        raise ModelError(f"{path} is not a GGUF file of version {' or '.join(map(str, _VERSIONS))}")
    tensors, values = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(values)}
    listed = []
    for _ in range(tensors):
        name, rank = reader.text(), reader.number("I")
        # ggml counts dimensions from the one that lies closest in memory
        shape = tuple(reversed([reader.number("Q") for _ in range(rank)]))
        listed.append((name, shape, reader.number("I"), reader.number("Q")))
    step = int(metadata.get("general.alignment", 32))
    start = -(-reader.at // step) * step
    made = {}
    for name, shape, kind, offset in listed:
        how = _KINDS.get(kind)
        count = int(np.prod(shape, dtype=np.int64))
        reader.at = start + offset
        content = reader.take(count // how.count * how.size if how else 0)
        made[name] = dequantize(content, kind, f"{name} in {path}").reshape(shape)
    return Gguf(metadata, made)
