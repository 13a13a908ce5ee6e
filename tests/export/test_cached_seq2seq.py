"""Encoder–decoders: two graphs that give what the whole model gives, with a cache and without."""

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import GenerationConfig

from compress.checkpoint import Checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from export.graph import ExportConfig, build_graph
from export.parts import parts
from export.publish import export_onnx
from export.sessions import open_session, run
from tests.compress.test_prune import apply_plan, random_plan
from tests.export.graphs import save
from tests.tiny import tiny_checkpoint

FAMILIES = [
    "t5",
    pytest.param("bart", marks=pytest.mark.slow),  # whose code marian shares
    "marian",
]
DECODER = "decoder_model_merged"


@functools.cache
def whole(family: str) -> Checkpoint:
    return tiny_checkpoint(family, "text2text-generation")


@functools.cache
def graph_bytes(family: str, name: str) -> bytes:
    model = build_graph(parts(whole(family))[name], ExportConfig())
    return bytes(ir.to_proto(model).SerializeToString())


def decoder_of(family: str) -> Checkpoint:
    return parts(whole(family))[DECODER]


@functools.cache
def session(family: str, name: str, optimize: bool = True) -> ort.InferenceSession:
    return open_session(graph_bytes(family, name), threads=1, optimize=optimize)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5, err_msg=name)


# --- what the parts are -----------------------------------------------------------------------------


def test_names_and_order_are_the_ecosystems() -> None:
    made = parts(whole("t5"))
    assert list(made) == ["encoder_model", DECODER]
    encoder, decoder = made["encoder_model"].signature, made[DECODER].signature
    assert encoder.names == ("input_ids", "attention_mask")
    assert encoder.outputs == ("last_hidden_state",)
    cache = [
        f"{n}.{s}.{k}" for n in (0, 1) for s in ("decoder", "encoder") for k in ("key", "value")
    ]
    assert decoder.names == (
        "encoder_attention_mask",
        "input_ids",
        "encoder_hidden_states",
        *(f"past_key_values.{name}" for name in cache),
        "use_cache_branch",
    )
    assert decoder.outputs == ("logits", *(f"present.{name}" for name in cache))
    taken = session("t5", DECODER).get_inputs()
    assert tuple(item.name for item in taken) == decoder.names
    assert taken[-1].type == "tensor(bool)"
    given = session("t5", DECODER).get_outputs()
    assert tuple(item.name for item in given) == decoder.outputs
    # optimum's client reads the sizes of the outputs from these names
    assert given[1].shape == ["batch", 4, "sequence + past_sequence", 8]
    assert given[3].shape == ["batch", 4, "encoder_sequence", 8]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_prompt_and_steps_in_pytorch_are_one_run_of_the_whole(family: str) -> None:
    checkpoint = whole(family)
    made = parts(checkpoint)
    source = checkpoint.signature.sample(3, 9, ragged=True)
    states = made["encoder_model"].predict(source)["last_hidden_state"]
    decoder = made[DECODER]
    ids = source["decoder_input_ids"]
    expected = checkpoint.predict(source)["logits"]
    feed = decoder.signature.sample(3, 4, past=0) | {
        "encoder_hidden_states": torch.from_numpy(states),
        "encoder_attention_mask": source["attention_mask"],
    }
    logits = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        outputs = decoder.predict(feed | {"input_ids": ids[:, start:end]})
        logits.append(outputs.pop("logits"))
        feed |= {n.replace("present", "past_key_values"): torch.from_numpy(v)
                 for n, v in outputs.items()}  # fmt: skip
        feed["use_cache_branch"] = torch.tensor([True])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=1e-3, atol=2e-5)


def test_model_without_a_cache_of_both_is_one_graph() -> None:
    assert list(parts(tiny_checkpoint("t5"))) == ["model"]  # no task that generates


# --- the graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_equal_pytorch_in_prompt_and_step(family: str) -> None:
    for name, part in parts(whole(family)).items():
        for optimize in (False, True):
            opened = session(family, name, optimize)
            for batch, sequence, past in ((1, 1, 0), (3, 5, 0), (3, 1, 4), (1, 3, 9)):
                sample = part.signature.sample(batch, sequence, past=past, ragged=True)
                assert_same(run(opened, sample), part.predict(sample))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [0, 1, 6])
def test_without_a_cache_its_inputs_are_ignored(family: str, length: int) -> None:
    sample = decoder_of(family).signature.sample(2, 5, past=0)
    expected = decoder_of(family).predict(sample)
    for name, value in sample.items():
        if name.startswith("past_key_values."):
            sample[name] = value.new_full((2, value.shape[1], length, value.shape[3]), torch.nan)
    assert_same(decoder_of(family).predict(sample), expected)
    assert_same(run(session(family, DECODER), sample), expected)
    assert_same(run(session(family, DECODER, optimize=False), sample), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_nothing_is_computed_from_the_encoders_states(family: str) -> None:
    sample = decoder_of(family).signature.sample(2, 1, past=5)
    expected = decoder_of(family).predict(sample)
    sample["encoder_hidden_states"].fill_(torch.nan)
    assert_same(run(session(family, DECODER), sample), expected)


@pytest.mark.parametrize("target", ["portable", "cpu", "cuda"])
def test_one_branch_holds_the_projections_of_all_layers(target: str, tmp_path: Path) -> None:
    model = build_graph(decoder_of("t5"), ExportConfig(target=target))
    onnx.checker.check_model(str(save(model, tmp_path)), full_check=True)
    (choice,) = (node for node in model.graph if node.op_type == "If")
    then, other = (choice.attributes[n].as_graph() for n in ("then_branch", "else_branch"))
    assert Counter(node.op_type for node in then) == {"Identity": 4}
    assert sum(node.op_type in ("MatMul", "Gemm") for node in other) == 4
    assert [value.name for value in choice.outputs] == [
        f"present.{n}.encoder.{kind}" for n in (0, 1) for kind in ("key", "value")
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_stored_twice(family: str) -> None:
    proto = onnx.load_from_string(graph_bytes(family, DECODER))
    contents = [t.raw_data for t in proto.graph.initializer if len(t.raw_data) > 256]
    assert len(contents) == len(set(contents))
    size = sum(map(len, contents))
    backbone: Any = whole(family).backbone
    encoder = {id(p) for p in backbone.get_encoder().parameters()}
    shared = {id(p) for p in backbone.get_decoder().parameters()}
    own = sum(p.numel() for p in backbone.parameters() if id(p) in shared or id(p) not in encoder)
    assert size <= 1.05 * 4 * own


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_what_transformers_generates(family: str) -> None:
    checkpoint = whole(family)
    source = checkpoint.signature.sample(3, 9, ragged=True, seed=3)
    ids, mask = source["input_ids"], source["attention_mask"]
    backbone: Any = checkpoint.backbone
    backbone.generation_config = GenerationConfig(
        decoder_start_token_id=2, pad_token_id=0, max_new_tokens=20, do_sample=False
    )
    expected = backbone.generate(ids, attention_mask=mask).numpy()

    states = run(session(family, "encoder_model"), source)["last_hidden_state"]
    feed = {"encoder_hidden_states": states, "encoder_attention_mask": mask.numpy()}
    tokens = np.full((3, 1), 2)
    text = [tokens]
    for _ in range(20):
        outputs = run(session(family, DECODER), feed | {"input_ids": tokens})
        tokens = outputs.pop("logits")[:, -1:].argmax(axis=-1)
        feed |= {n.replace("present", "past_key_values"): v for n, v in outputs.items()}
        feed["use_cache_branch"] = np.array([True])
        text.append(tokens)
    assert np.concatenate(text, axis=1).tolist() == expected.tolist()


# --- the whole way ----------------------------------------------------------------------------------


def test_bundle_of_two_graphs_passes_the_gate(tmp_path: Path) -> None:
    bundle, report = export_onnx(whole("t5"), tmp_path / "out", ExportConfig())
    assert report.passed
    assert {check.graph for check in report.checks} >= {"encoder_model", DECODER}
    assert sorted(path.name for path in bundle.path.iterdir()) == [
        "config.json",
        f"{DECODER}.onnx",
        "encoder_model.onnx",
        "generation_config.json",
        "onnxpress.json",
        "parity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert bundle.graphs[DECODER].signature == decoder_of("t5").signature


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_pruned_and_int8(family: str, tmp_path: Path) -> None:
    pruned = apply_plan(whole(family), random_plan(whole(family)))
    made = quantize(pruned, QuantizeConfig()).checkpoint
    _, report = export_onnx(made, tmp_path / "out", ExportConfig())
    assert {check.rule for check in report.checks} >= {"float", "int8 noise"}
