"""Block-wise weights through the exporter: the gate passes them, and notices every change."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from compress.checkpoint import Checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export.graph import MODULE, ExportConfig, build_graph
from export.parity import check_parity
from tests.export.graphs import NAMES, edit, operators, save
from tests.tiny import FAMILIES, tiny_checkpoint

CHANGED = "h.1.mlp.c_proj"


@functools.cache
def made(name: str, bits: int) -> Checkpoint:
    checkpoint = tiny_checkpoint(*NAMES[name])
    return quantize(checkpoint, QuantizeConfig("weight-only", bits=bits)).checkpoint


@functools.cache
def _bytes_of(name: str, bits: int, target: str) -> bytes:
    return bytes(
        ir.to_proto(build_graph(made(name, bits), ExportConfig(target))).SerializeToString()
    )


def graph_of(name: str, bits: int, target: str = "cpu") -> ir.Model:
    return ir.from_proto(onnx.load_from_string(_bytes_of(name, bits, target)))


@pytest.mark.parametrize(
    ("name", "bits", "target"),
    [
        *((name, bits, "cpu") for name in ("bert", "gpt2", "llama") for bits in (4, 8)),
        ("bert", 4, "portable"),
        ("gpt2", 8, "portable"),
        ("llama", 4, "cuda"),
    ],
)
def test_correct_graphs_pass(name: str, bits: int, target: str, tmp_path: Path) -> None:
    model = graph_of(name, bits, target)
    kind = "DequantizeLinear" if target == "portable" else "MatMulNBits"
    assert operators(model)[kind] > 0
    assert operators(model)["Gemm"] == 0
    report = check_parity(made(name, bits), save(model, tmp_path))
    assert report.passed, report.worst()


def input_of(index: int) -> Callable[[ir.Model], ir.Value]:
    """Return what finds an input of the changed module's product."""

    def found(model: ir.Model) -> ir.Value:
        (node,) = (
            n
            for n in model.graph
            if n.op_type in ("MatMulNBits", "DequantizeLinear")
            and n.metadata_props.get(MODULE, "").endswith(CHANGED)
        )
        value = node.inputs[index]
        assert value is not None
        return value

    return found


def one_step(array: np.ndarray) -> None:
    array.flat[array.size // 2] ^= 1


def one_percent(array: np.ndarray) -> None:
    array.flat[array.size // 2] *= 1.01


def less_precise(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            assert node.inputs[2] is not None
            edit(node.inputs[2], lambda a: a.__imul__(1.003))


CHANGES: dict[str, Callable[[ir.Model], Any]] = {
    "one weight by a step": lambda m: edit(input_of(1)(m), one_step),
    "one scale by 1 %": lambda m: edit(input_of(2)(m), one_percent),
    "one zero point by a step": lambda m: edit(input_of(3)(m), one_step),
    "one bias by 1 %": lambda m: edit(input_of(5)(m), one_percent),
    "all scales by 0.3 %": less_precise,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_graphs_fail(bits: int, change: str, tmp_path: Path) -> None:
    path = save(graph_of("gpt2", bits), tmp_path, CHANGES[change])
    report = check_parity(made("gpt2", bits), path)
    assert not report.passed
    if change.startswith("one"):
        assert report.diverges is not None
        assert CHANGED in report.diverges


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    config = QuantizeConfig("weight-only", bits=4, block_size=16)
    checkpoint = quantize(tiny_checkpoint(family), config).checkpoint
    model = build_graph(checkpoint, ExportConfig())
    assert operators(model)["MatMulNBits"] > 0
    report = check_parity(checkpoint, save(model, tmp_path))
    assert report.passed, report.worst()
