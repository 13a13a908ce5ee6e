import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
import torch

from compress.checkpoint import Checkpoint
from export.graph import ExportConfig, build_graph
from export.parts import parts
from export.passes import PASSES
from export.passes.cached_attention import cached_attention_
from export.passes.finite_masks import finite_masks_
from tests.export.graphs import graph_of, operators, run_graph
from tests.tiny import tiny_checkpoint


@functools.cache
def decoder(family: str) -> Checkpoint:
    (checkpoint,) = parts(tiny_checkpoint(family, "text-generation")).values()
    return checkpoint


@functools.cache
def portable(family: str) -> bytes:
    model = build_graph(decoder(family), ExportConfig(target="portable"))
    return bytes(ir.to_proto(model).SerializeToString())


def graph(family: str) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(portable(family)))


def real(
    found: Mapping[str, np.ndarray], sample: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Return the outputs at positions that are no padding: what stands there means nothing."""
    mask = sample["attention_mask"].numpy().astype(bool)
    kept = {}
    for name, value in found.items():
        if value.ndim == 4:
            kept[name] = value.transpose(0, 2, 1, 3)[mask]
        else:
            kept[name] = value[mask[:, -value.shape[1] :]]
    return kept


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral"])
@pytest.mark.parametrize(("batch", "sequence", "past"), [(3, 9, 0), (1, 4, 7), (3, 1, 6)])
def test_prompt_and_step_stay(family: str, batch: int, sequence: int, past: int) -> None:
    model = graph(family)
    sample = decoder(family).signature.sample(batch, sequence, ragged=True, past=past)
    before = real(run_graph(model, sample), sample)
    assert cached_attention_(model) == 2
    assert cached_attention_(model) == 0
    found = operators(model)
    assert (found["GroupQueryAttention"], found["Attention"]) == (2, 0)
    after = real(run_graph(model, sample), sample)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-3, atol=2e-5)


def test_cache_goes_straight_into_the_operator() -> None:
    model = graph("llama")
    names = [value.name for value in model.graph.outputs]
    cached_attention_(model)
    assert [value.name for value in model.graph.outputs] == names
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for index, node in enumerate(nodes):
        past = [value.name for value in node.inputs[3:5] if value is not None]
        assert past == [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        presents = [value.name for value in node.outputs[1:]]
        assert presents == [f"present.{index}.{kind}" for kind in ("key", "value")]
        assert node.attributes.get_int("num_heads", 0) == 4
        assert node.attributes.get_int("kv_num_heads", 0) == 2
        assert node.attributes.get_int("causal", 1) == 0
        assert node.metadata_props


def test_mask_is_made_once_and_finite() -> None:
    (checkpoint,) = parts(tiny_checkpoint("llama", "text-generation")).values()
    model = build_graph(checkpoint, ExportConfig())
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len({node.inputs[-1] for node in nodes}) == 1
    values = run_graph(with_output(model, nodes[0].inputs[-1]), checkpoint.signature.sample(2, 5))
    mask = values["mask"]
    assert np.isfinite(mask).all()
    assert mask.max() == 0
    assert mask.min() < -1e38


def with_output(model: ir.Model, value: ir.Value | None) -> ir.Model:
    assert value is not None
    value.name = "mask"
    model.graph.outputs.append(value)
    return model


def test_models_without_a_cache_are_left_alone() -> None:
    assert cached_attention_(graph_of("bert", target="portable")) == 0
    assert cached_attention_(graph_of("llama", target="portable")) == 0


def test_only_onnx_runtime_gets_it() -> None:
    assert cached_attention_ not in PASSES["portable"]
    assert cached_attention_ in PASSES["cpu"]
    assert operators(graph("llama"))["Attention"] == 2
    assert finite_masks_(graph("llama")) == 0  # its mask is true or false
