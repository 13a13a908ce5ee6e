from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from compress.checkpoint import Checkpoint
from export.graph import ExportConfig, build_graph
from export.parity import check_graphs
from export.parts import parts
from export.stepwise import STEPS, Text, at_once, check_across_calls, step_by_step, text_for
from tests.export.graphs import cached_graph_of, checkpoint_of, save
from tests.tiny import tiny_checkpoint

Graphs = dict[str, tuple[Checkpoint, Path]]


def graphs_of(name: str, folder: Path, int8: bool = False, change: Any = None) -> Graphs:
    part = parts(checkpoint_of(name, int8))["model"]
    return {"model": (part, save(cached_graph_of(name, int8), folder, change))}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_steps_give_what_the_whole_text_gives(name: str, int8: bool, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name, int8)
    checks = list(check_across_calls(checkpoint, graphs_of(name, tmp_path, int8)))
    assert [check.session for check in checks] == ["cpu plain", "cpu optimized"]
    for check in checks:
        assert check.passed, check
        assert check.rule == "across calls"
        assert check.case == f"prompt of 11 and {STEPS} steps"


def swap_caches(model: ir.Model) -> None:
    """Return the first layer's values as the second's, which no single call shows as wrong."""
    one, other = (v for v in model.graph.outputs if str(v.name).endswith(".value"))
    one.name, other.name = other.name, one.name


def test_cache_that_goes_astray_between_calls_fails(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("gpt2")
    checks = list(check_across_calls(checkpoint, graphs_of("gpt2", tmp_path, change=swap_caches)))
    assert not any(check.passed for check in checks)


def test_wrapper_that_differs_from_the_model_fails(tmp_path: Path) -> None:
    """A graph may equal its part in every case; here the part is another model's."""
    other = tiny_checkpoint("gpt2", "text-generation", seed=1)
    report = check_graphs(other, graphs_of("gpt2", tmp_path))
    assert {c.rule for c in report.checks if not c.passed} == {"across calls"}


def test_graph_that_cannot_take_a_step_fails(tmp_path: Path) -> None:
    def fixed(model: ir.Model) -> None:
        for value in model.graph.inputs:
            if str(value.name).startswith("past_key_values."):
                value.shape = ir.Shape([3, 4, 0, 8])

    checks = list(
        check_across_calls(checkpoint_of("gpt2"), graphs_of("gpt2", tmp_path, change=fixed))
    )
    assert all(check.rule.startswith("does not run: ") for check in checks)
    assert not any(check.passed for check in checks)


def test_graphs_without_a_cache_need_no_steps(tmp_path: Path) -> None:
    assert (
        list(
            check_across_calls(checkpoint_of("bert"), {"model": (checkpoint_of("bert"), tmp_path)})
        )
        == []
    )


def test_calls_of_a_decoder() -> None:
    told = []

    def decoder(inputs: Any) -> dict[str, np.ndarray]:
        told.append({name: np.asarray(value) for name, value in inputs.items()})
        return {
            "logits": np.zeros((1, inputs["input_ids"].shape[1], 5)),
            "present.0.key": np.array(len(told)),
        }

    text = Text(torch.arange(8)[None], torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]), {})
    assert step_by_step(decoder, None, text).shape == (1, 8, 5)
    assert [call["input_ids"].tolist() for call in told] == [
        [[0, 1]],
        *([[i]] for i in range(2, 8)),
    ]
    assert [call["attention_mask"].shape[1] for call in told] == [2, 3, 4, 5, 6, 7, 8]
    assert told[-1]["position_ids"].tolist() == [[5]]
    assert "past_key_values.0.key" not in told[0]
    assert [int(call["past_key_values.0.key"]) for call in told[1:]] == [1, 2, 3, 4, 5, 6]
    assert [bool(call["use_cache_branch"][0]) for call in told] == [False, *[True] * 6]


@pytest.mark.slow
def test_encoder_and_decoder(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bart", "text2text-generation")
    graphs = {}
    for name, part in parts(checkpoint).items():
        path = tmp_path / f"{name}.onnx"
        ir.save(build_graph(part, ExportConfig()), path)
        graphs[name] = (part, path)
    checks = list(check_across_calls(checkpoint, graphs))
    assert len(checks) == 2
    assert all(check.passed for check in checks)
    text = text_for(graphs["decoder_model_merged"][0], graphs["encoder_model"][0])
    assert not text.encoder["attention_mask"].all()
    assert text.mask.all()
    other = tiny_checkpoint("bart", "text2text-generation", seed=1)
    assert not any(check.passed for check in check_across_calls(other, graphs))
    shape = (*text.ids.shape, checkpoint.signature.vocabulary)
    assert at_once(checkpoint, checkpoint.backbone, text).shape == shape
