"""Every family that is said to work: exported, and held to the gate, float and int8."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.static_int8 import StaticInt8Linear
from export.graph import ExportConfig, build_graph
from export.parity import check_graphs
from export.parts import parts
from tests.compress.test_prune import apply_plan, random_plan
from tests.export.graphs import save
from tests.tiny import EXPORT_ONLY, FAMILIES, SampledBatches, tiny_checkpoint, write

# family → why it cannot be exported; strict, so that a repaired one is noticed
KNOWN: dict[str, str] = {}
KNOWN_INT8: dict[str, str] = {}

DECODERS = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3")
SEQ2SEQ = ("bart", "marian", "t5")
# what makes the model one layer deeper beside its encoder (Swin: two, one with shifted windows)
DEEPER: dict[str, dict[str, Any]] = {
    "bart": {"decoder_layers": 3},
    "marian": {"decoder_layers": 3},
    "swin": {"depths": [4, 2]},
    "t5": {"num_decoder_layers": 3},
}

# what a layer may not compute anew: masks, rotary tables, shapes
ONCE = (
    *("And", "Cast", "Cos", "Equal", "Expand", "Gather", "GatherND", "Greater", "GreaterOrEqual"),
    *("IsNaN", "Less", "LessOrEqual", "Not", "Or", "Range", "Shape", "Sin", "Squeeze", "Unsqueeze"),
    "Where",
)
# what attention, normalisation and activation are made of, where they are not one operator
PIECES = ("Erf", "Pow", "Reciprocal", "ReduceMean", "Softmax", "Sqrt", "Tanh")
# attentions, normalisations, rotations and activations of a layer, where not (1, 2, 0, 1)
LAYER: dict[str, tuple[int, int, int, int]] = {
    **dict.fromkeys(("gemma", "gpt_neox", "llama", "mistral", "qwen2"), (1, 2, 2, 1)),
    "modernbert": (1, 2, 2, 1),
    "phi": (1, 1, 2, 1),
    "qwen3": (1, 4, 2, 1),
    **dict.fromkeys(SEQ2SEQ, (3, 5, 0, 2)),
    "swin": (2, 4, 0, 2),
}


def parameters(known: Mapping[str, str] = KNOWN) -> list:
    return [
        pytest.param(family, marks=pytest.mark.xfail(strict=True, reason=known[family]))
        if family in known
        else family
        for family in (*FAMILIES, *EXPORT_ONLY)
    ]


def attentions(found: Counter[str]) -> int:
    return found["Attention"] + found["GroupQueryAttention"]


def whole(family: str, **changes: Any) -> Checkpoint:
    """Return a checkpoint of the family for the task that needs most of it."""
    task = "feature-extraction"
    if family in DECODERS:
        task = "text-generation"
    if family in SEQ2SEQ:
        task = "text2text-generation"
    return tiny_checkpoint(family, task, **changes)


def held_to_the_gate(checkpoint: Checkpoint, folder: Path) -> Counter[str]:
    """Export every graph of the checkpoint, check them all; return what operators they have."""
    graphs, found = {}, Counter[str]()
    for name, part in parts(checkpoint).items():
        model = build_graph(part, ExportConfig())
        found += Counter(node.op_type for node in model.graph.all_nodes())
        (folder / name).mkdir()
        graphs[name] = (part, save(model, folder / name))
    report = check_graphs(checkpoint, graphs)
    assert report.passed, report.worst()
    return found


def graph_operators(family: str, **changes: Any) -> Counter[str]:
    """Return the operators of the one graph of a family: of a pair of graphs, the plain encoder's."""
    task = "text-generation" if family in DECODERS else "feature-extraction"
    (checkpoint,) = parts(tiny_checkpoint(family, task, **changes)).values()
    model = build_graph(checkpoint, ExportConfig())
    return Counter(node.op_type for node in model.graph.all_nodes())


def per_layer(family: str, found: Counter[str]) -> Counter[str]:
    """Return which operators one more layer adds to the graph with those in `found`."""
    more = graph_operators(family, **{"num_hidden_layers": 3, **DEEPER.get(family, {})})
    more.subtract(found)
    return Counter({name: count for name, count in more.items() if count and name != "Constant"})


@pytest.mark.parametrize("family", parameters())
def test_float(family: str, tmp_path: Path) -> None:
    found = held_to_the_gate(whole(family), tmp_path)
    assert attentions(found) == (6 if family in SEQ2SEQ else 4 if family == "swin" else 2)
    if family in SEQ2SEQ:  # whose pair of graphs is not what a layer is counted in
        found = graph_operators(family)
    assert_a_layer_computes_only_what_is_its_own(family, per_layer(family, found))


def assert_a_layer_computes_only_what_is_its_own(family: str, cost: Counter[str]) -> None:
    """Check that a layer is whole operators, with nothing that all layers could share."""
    assert {name: cost[name] for name in (*ONCE, *PIECES) if cost[name]} == {}
    # Swin rolls its windows back and forth
    assert cost["Concat"] == (4 if family == "swin" else 0)
    made = (
        attentions(cost),
        cost["LayerNormalization"] + cost["RMSNormalization"],
        cost["RotaryEmbedding"],
        sum(cost[name] for name in ("Gelu", "QuickGelu", "Relu", "Sigmoid")),
    )
    assert made == LAYER.get(family, (1, 2, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", parameters(KNOWN_INT8))
def test_pruned_and_int8(family: str, tmp_path: Path) -> None:
    made = quantize(pruned(whole(family)), QuantizeConfig()).checkpoint
    assert held_to_the_gate(made, tmp_path)["MatMulInteger"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        family if family in ("bert", "gpt2", "t5", "vit")
        else pytest.param(family, marks=pytest.mark.exhaustive)
        for family in (*FAMILIES, *EXPORT_ONLY)
    ],
)  # fmt: skip
def test_pruned_and_static(family: str, tmp_path: Path) -> None:
    checkpoint = pruned(whole(family))
    made = quantize(checkpoint, QuantizeConfig("static"), SampledBatches(checkpoint)).checkpoint
    found = held_to_the_gate(made, tmp_path)
    layers = [m for m in made.module.modules() if isinstance(m, StaticInt8Linear)]
    assert found["MatMulIntegerToFloat"] >= len(layers)  # the graphs of a pair share some
    # DeBERTa's attention compares relative positions outside the operator
    assert found["MatMul"] == (8 if family == "deberta-v2" else 0)
    assert found["Gemm"] == 0


def pruned(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with other widths in every layer, where it has prunable blocks."""
    try:
        plan = random_plan(checkpoint)
    except ModelError:
        return checkpoint
    return apply_plan(checkpoint, plan)


ENCODERS = (
    *("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet"),
    *("roberta", "xlm-roberta"),
)
TASKS = ("text-classification", "token-classification", "fill-mask", "question-answering")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task"),
    [
        pytest.param(family, task, marks=[] if family == "bert" else pytest.mark.exhaustive)
        for family in ENCODERS
        for task in TASKS
    ],
)
def test_an_encoder_with_the_head_of_each_task(family: str, task: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, task)
    assert list(parts(checkpoint)) == ["model"]
    wanted = ["start_logits", "end_logits"] if task == "question-answering" else ["logits"]
    assert list(checkpoint.signature.outputs) == wanted
    assert attentions(held_to_the_gate(checkpoint, tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.exhaustive) for f in ENCODERS if f != "bert"]
)
def test_an_encoder_as_a_sentence_encoder(family: str, tmp_path: Path) -> None:
    plain = tiny_checkpoint(family)
    directory = write(plain, tmp_path / "plain")
    checkpoint = open_checkpoint(directory, task="sentence-embedding")
    (tmp_path / "graphs").mkdir()
    assert attentions(held_to_the_gate(checkpoint, tmp_path / "graphs")) == 2
    assert checkpoint.signature.outputs[:2] == ("token_embeddings", "sentence_embedding")
