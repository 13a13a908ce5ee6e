"""Writing a graph without holding its weights a second and third time."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

# protobuf holds 2 GiB; past this the weights go beside the graph
EXTERNAL_DATA_BYTES = 2**31 - 2**24
_STREAMED = 1024  # bytes from which a weight is written on its own
_PAGE, _PAGED = 2**16, 2**20  # a weight of 1 MB starts on a page, so that it can be mapped as it is

# field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


def write_model(model: ir.Model, path: Path, external_over: int = EXTERNAL_DATA_BYTES) -> None:
    """Write `model` at `path`; weights of more than `external_over` bytes in all go to `path`.data.

    A protobuf message is built in memory and then turned into bytes, which would take the weights
    twice. Here the message is built without them, and each weight is appended to the file in the
    same wire format, straight from where it lies (protobuf.dev/programming-guides/encoding).
    """
    weights = [v for v in model.graph.initializers.values() if v.const_value is not None]
    streamed = [
        v for v in weights if v.const_value and v.const_value.nbytes >= _STREAMED and _raw(v)
    ]
    tensors = [v.const_value for v in streamed if v.const_value is not None]
    if sum(v.const_value.nbytes for v in weights if v.const_value) > external_over:
        places = _write_data(streamed, path.with_name(f"{path.name}.data"))
        with _holding(streamed, places):
            path.write_bytes(ir.to_proto(model).SerializeToString())
        return
    heads = [_head(str(v.name), t) for v, t in zip(streamed, tensors)]
    with _holding(streamed, [None] * len(streamed)):
        proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    entries = [len(head) + tensor.nbytes for head, tensor in zip(heads, tensors)]
    size = len(graph) + sum(len(_field(_INITIALIZER, n)) + n for n in entries)
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_field(_GRAPH, size))
        file.write(graph)
        for head, tensor, length in zip(heads, tensors, entries):
            file.write(_field(_INITIALIZER, length))
            file.write(head)
            _write_raw(tensor, file)


def _write_data(values: list[ir.Value], path: Path) -> list[ir.ExternalTensor]:
    """Write the weights into a file of their own and return where each stands in it.

    onnx_ir would write them with NumPy's `tofile`, which does not tell a full disk from other errors.
    """
    places = []
    with path.open("wb") as file:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes >= _PAGED:
                file.seek(-file.tell() % _PAGE, os.SEEK_CUR)
            places.append(
                ir.ExternalTensor(
                    path.name, file.tell(), tensor.nbytes, tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()), name=str(value.name), base_dir=path.parent,
                )
            )  # fmt: skip
            _write_raw(tensor, file)
    return places


def _raw(value: ir.Value) -> bool:
    """Whether the weight is written as its bytes, which holds for all numbers."""
    return value.const_value is not None and value.const_value.dtype != ir.DataType.STRING


def _head(name: str, tensor: ir.TensorProtocol) -> bytes:
    """Return a TensorProto up to its bytes: name, shape, type, and the length of what follows."""
    proto = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=int(tensor.dtype))
    return bytes(proto.SerializeToString()) + _field(_RAW_DATA, tensor.nbytes)


def _write_raw(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    file.write(tensor.tobytes())


def _field(number: int, length: int) -> bytes:
    """Return the tag and length that precede a length-delimited field."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


@contextmanager
def _holding(
    values: list[ir.Value], contents: Sequence[ir.ExternalTensor | None]
) -> Iterator[None]:
    """Give `values` other contents, or none, for a while."""
    kept = [value.const_value for value in values]
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # onnx_ir warns of each
    try:
        for value, content in zip(values, contents):
            value.const_value = content
        yield
    finally:
        logging.disable(level)
        for value, tensor in zip(values, kept):
            value.const_value = tensor
