"""Does the parity gate notice? Random single mutations of graphs, and what became of them.

    python -m benchmarks.gate_mutations --count 200 -o OUT

Small random models of several families are exported, one thing in a graph is changed, and the whole
gate runs on what comes out. A change that it misses is tried on a large sample that the gate has not
seen: if no output moves by more than its own rounding error, the change is *equivalent*, else the
gate has *missed* it. Changes that leave no runnable graph are *refused*, and count neither way.
"""

import argparse
import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.quantize import QuantizeConfig, dequantized, quantize
from compress.signature import named_outputs, transformer_signature
from compress.tasks import get_task
from compress.versions import versions
from export.cases import tokens_of
from export.graph import MODULE, ExportConfig, build_graph
from export.linearize import linearized
from export.parity import check_graphs
from export.parts import parts
from export.sessions import open_session, run
from export.tolerance import errors, pooled_errors
from export.verdict import BROKEN

_TEXT = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
_VIT = {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
# name → (model type, task, config, quantization scheme, opset)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str | None, int]] = {
    "encoder": ("bert", "feature-extraction", _TEXT | _SIZES, None, 23),
    "encoder, opset 18": ("bert", "feature-extraction", _TEXT | _SIZES, None, 18),
    "classifier": ("bert", "text-classification", _TEXT | _SIZES | {"num_labels": 5}, None, 23),
    "decoder": ("gpt2", "text-generation", _TEXT | _GPT2, None, 23),
    "rotary decoder": (
        "llama", "text-generation", _TEXT | _SIZES | {"num_key_value_heads": 2}, None, 23,
    ),
    "vision": ("vit", "image-classification", _SIZES | _VIT, None, 23),
    "int8 encoder": ("bert", "feature-extraction", _TEXT | _SIZES, "dynamic", 23),
    "int8 decoder": ("gpt2", "text-generation", _TEXT | _GPT2, "dynamic", 23),
    "int8 vision": ("vit", "image-classification", _SIZES | _VIT, "dynamic", 23),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """An exported model, ready to be mutated."""

    checkpoint: Checkpoint
    part: Checkpoint
    content: bytes

    def graph(self) -> ir.Model:
        """Return a fresh copy of the graph."""
        return ir.from_proto(onnx.load_from_string(self.content))


@dataclass(frozen=True)
class Outcome:
    """One mutation and what the gate made of it."""

    family: str
    kind: str
    site: str
    module: str
    verdict: str  # caught, equivalent, missed or refused
    rules: tuple[str, ...] = ()  # that failed
    named: bool | None = None  # whether the report names the module that was touched
    proof: str = ""


def build(family: str) -> Subject:
    """Return the exported model of one family, its weights drawn as large as trained ones."""
    kind, task, settings, scheme, opset = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, get_task(task).auto_class).from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(3)
            else:
                value.add_(torch.randn_like(value), alpha=0.1)
    model = model.eval()
    checkpoint = Checkpoint(model, task, transformer_signature(model, model, None))
    if scheme is not None:
        checkpoint = quantize(checkpoint, QuantizeConfig(scheme=scheme)).checkpoint
    (part,) = parts(checkpoint).values()
    graph = build_graph(part, ExportConfig(opset=opset))
    return Subject(checkpoint, part, bytes(ir.to_proto(graph).SerializeToString()))


# --- mutations: each changes one thing in place and tells where, or returns None ------------------

Random = np.random.Generator
Mutation = Callable[[ir.Model, Random], "tuple[str, str] | None"]  # (site, module)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _pick(random: Random, items: list[Any]) -> Any:
    return items[int(random.integers(len(items)))] if items else None


def _at(node: ir.Node, what: str) -> tuple[str, str]:
    return f"{what} of {node.op_type} {node.name}", node.metadata_props.get(MODULE, "")


def _constants(model: ir.Model, kinds: tuple[ir.DataType, ...]) -> list[tuple[ir.Value, ir.Node]]:
    """Return the stored tensors of those dtypes with their first reader."""
    found = []
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.dtype in kinds:
                found.append((value, node))
            elif value is not None and (made := value.producer()) and made.op_type == "Constant":
                tensor = made.attributes["value"].value if "value" in made.attributes else None
                if tensor is not None and tensor.dtype in kinds:
                    found.append((value, node))
    return list({value: (value, node) for value, node in reversed(found)}.values())


def _array(value: ir.Value) -> np.ndarray:
    made = value.producer()
    tensor: Any = value.const_value if made is None else made.attributes["value"].value
    return np.asarray(tensor.numpy())


def _set(value: ir.Value, array: np.ndarray) -> None:
    tensor = ir.tensor(np.ascontiguousarray(array), name=value.name)
    made = value.producer()
    if made is None:
        value.const_value = tensor
    else:
        made.attributes["value"] = ir.AttrTensor("value", tensor)


def _weights(model: ir.Model, rank: tuple[int, ...] = (1, 2, 3, 4)) -> list[Any]:
    found = _constants(model, _FLOATS)
    return [(v, n) for v, n in found if _array(v).ndim in rank and _array(v).size > 4]


def weight_element(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One number of a weight × 1.01."""
    chosen = _pick(random, _weights(model))
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy()
    index = _pick(random, [tuple(i) for i in np.argwhere(array != 0)])
    array[index] *= 1.01
    _set(value, array)
    return _at(node, f"{value.name}{[int(i) for i in index]}")


def weight_row(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One row of a weight × 1.01."""
    chosen = _pick(random, _weights(model, (2,)))
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy()
    row = int(random.integers(len(array)))
    array[row] *= 1.01
    _set(value, array)
    return _at(node, f"{value.name}[{row}]")


def weight_tensor(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A whole weight × 1.01."""
    chosen = _pick(random, _weights(model))
    if chosen is None:
        return None
    value, node = chosen
    _set(value, _array(value) * np.array(1.01, _array(value).dtype))
    return _at(node, str(value.name))


def bias_dropped(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A bias set to zero."""
    found = [
        (v, n)
        for v, n in _weights(model, (1,))
        if n.op_type in ("Add", "Sum", "Gemm", "LayerNormalization", "Conv") and n.inputs[-1] is v
    ]
    chosen = _pick(random, found)
    if chosen is None:
        return None
    _set(chosen[0], np.zeros_like(_array(chosen[0])))
    return _at(chosen[1], str(chosen[0].name))


def scalar_constant(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A float constant that is no weight × 1.01."""
    found = [(v, n) for v, n in _constants(model, _FLOATS) if 0 < _array(v).size <= 4]
    chosen = _pick(
        random, [(v, n) for v, n in found if np.isfinite(_array(v)).all() and _array(v).any()]
    )
    if chosen is None:
        return None
    value, node = chosen
    _set(value, (_array(value) * 1.01).astype(_array(value).dtype))
    return _at(node, f"{value.name} = {_array(value).ravel()[0]:.4g}")


def off_by_one(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A whole number of a slice, split, range, index or comparison ± 1."""
    kinds = ("Slice", "Split", "Range", "Gather", "Add", "Sub", "Cast", "Mul", "Concat", "Reshape")
    found = [(v, n) for v, n in _constants(model, (ir.DataType.INT64,)) if n.op_type in kinds]
    chosen = _pick(random, found)
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy().reshape(-1)
    index = int(random.integers(len(array)))
    array[index] += _pick(random, [-1, 1])
    _set(value, array.reshape(_array(value).shape))
    return _at(node, f"{value.name}[{index}]")


_ORDERED = (
    "Sub", "Div", "Pow", "MatMul", "Concat", "Where", "Less", "LessOrEqual", "Greater",
    "GreaterOrEqual", "Attention", "GroupQueryAttention", "MultiHeadAttention", "Range", "Gather",
)  # fmt: skip


def swapped_inputs(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Two inputs of an operator that does not commute, swapped."""
    pairs = []
    for node in model.graph:
        if node.op_type not in _ORDERED:
            continue
        first = 1 if node.op_type == "Where" else 0
        last = 3 if "Attention" in node.op_type or node.op_type == "Where" else 2
        chosen = list(enumerate(node.inputs))[first:last]
        pairs += [
            (node, i, j)
            for i, a in chosen
            for j, b in chosen
            if i < j and a is not None and b is not None and a is not b
        ]
    pair = _pick(random, pairs)
    if pair is None:
        return None
    node, i, j = pair
    a, b = node.inputs[i], node.inputs[j]
    node.replace_input_with(i, b)
    node.replace_input_with(j, a)
    return _at(node, f"inputs {i} and {j}")


def changed_axis(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Another axis, or two entries of a permutation swapped."""
    found = [
        (node, name)
        for node in model.graph
        for name in ("axis", "perm", "axes")
        if name in node.attributes
    ]
    chosen = _pick(random, found)
    if chosen is None:
        return None
    node, name = chosen
    if name == "axis":
        old = node.attributes[name].as_int()
        node.attributes[name] = ir.AttrInt64(
            name, _pick(random, [a for a in range(-2, 3) if a != old])
        )
    else:
        order = list(node.attributes[name].as_ints())
        i, j = (int(i) for i in random.permutation(max(len(order), 2))[:2])
        if len(order) < 2:
            order[0] += 1
        else:
            order[i], order[j] = order[j], order[i]
        node.attributes[name] = ir.AttrInt64s(name, order)
    return _at(node, name)


_MASK_INPUT = {"Attention": 3, "GroupQueryAttention": 10, "MultiHeadAttention": 5}


def dropped_mask(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Attention without its mask."""
    found = [
        node
        for node in model.graph
        if len(node.inputs) > _MASK_INPUT.get(node.op_type, 99)
        and node.inputs[_MASK_INPUT[node.op_type]] is not None
    ]
    node = _pick(random, found)
    if node is None:
        return None
    node.replace_input_with(_MASK_INPUT[node.op_type], None)
    return _at(node, "the mask")


def changed_mask(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A comparison or a logical operator of the mask replaced by its neighbour."""
    others = {"LessOrEqual": "Less", "Less": "LessOrEqual", "GreaterOrEqual": "Greater",
              "Greater": "GreaterOrEqual", "And": "Or", "Or": "And"}  # fmt: skip
    node = _pick(random, [n for n in model.graph if n.op_type in others])
    return None if node is None else _renamed(node, others[node.op_type])


def changed_activation(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """An activation replaced by a similar one."""
    others = {"Erf": "Tanh", "Tanh": "Erf", "Sigmoid": "HardSigmoid", "Relu": "Softplus",
              "Swish": "Mish", "QuickGelu": "Gelu"}  # fmt: skip
    node = _pick(random, [n for n in model.graph if n.op_type in others])
    return None if node is None else _renamed(node, others[node.op_type])


def _renamed(node: ir.Node, kind: str) -> tuple[str, str]:
    told = _at(node, f"{kind} instead")
    node.op_type = kind
    return told


def gelu_approximation(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """The other of the two formulas for Gelu."""
    node = _pick(random, [n for n in model.graph if n.op_type == "Gelu" and not n.domain])
    if node is None:
        return None
    old = node.attributes.get_string("approximate", "none")
    new = "none" if old == "tanh" else "tanh"
    node.attributes["approximate"] = ir.AttrString("approximate", new)
    return _at(node, f"{new} instead")


def altered_epsilon(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Another usual epsilon in a normalisation."""
    node = _pick(random, [n for n in model.graph if "epsilon" in n.attributes])
    if node is None:
        return None
    old = node.attributes["epsilon"].as_float()
    new = _pick(random, [e for e in (1e-12, 1e-6, 1e-5, 1e-3) if not np.isclose(e, old)])
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", new)
    return _at(node, f"{new} for {old:.0e}")


def attention_scale(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Attention scores scaled otherwise."""
    node = _pick(random, [n for n in model.graph if n.op_type in _MASK_INPUT])
    if node is None:
        return None
    old = node.attributes.get_float("scale", 0.0) or 8**-0.5  # heads of 8
    factor = _pick(random, [1.01, 2**0.5, 8**-0.5, 0.99])
    node.attributes["scale"] = ir.AttrFloat32("scale", old * factor)
    return _at(node, f"scale × {factor:.3g}")


def dropped_residual(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One of two summed activations left out."""
    found = [
        n
        for n in model.graph
        if n.op_type in ("Add", "Sum")
        and len(n.inputs) == 2
        and n.inputs[0] is not n.inputs[1]
        and all(v is not None and v.const_value is None and v.dtype in _FLOATS for v in n.inputs)
    ]
    node = _pick(random, found)
    if node is None:
        return None
    kept = int(random.integers(2))
    node.replace_input_with(1 - kept, None)
    node.op_type = "Identity"
    source = node.inputs[kept]
    node.resize_inputs(1)
    node.replace_input_with(0, source)
    return _at(node, f"input {1 - kept}")


def changed_rotation(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """A rotary embedding interleaved, or with sine and cosine swapped."""
    node = _pick(random, [n for n in model.graph if n.op_type in ("RotaryEmbedding", "Cos", "Sin")])
    if node is None:
        return None
    if node.op_type != "RotaryEmbedding":
        return _renamed(node, {"Cos": "Sin", "Sin": "Cos"}[node.op_type])
    if random.integers(2):
        first = 1 if not node.domain else 2
        a, b = node.inputs[first : first + 2]
        node.replace_input_with(first, b)
        node.replace_input_with(first + 1, a)
        return _at(node, "sine and cosine")
    old = node.attributes.get_int("interleaved", 0)
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1 - old)
    return _at(node, "interleaved")


def shifted_positions(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """Positions counted from one instead of zero, for one reader."""
    value = next((v for v in model.graph.inputs if v.name == "position_ids"), None)
    use = _pick(random, list(value.uses())) if value is not None else None
    if use is None:
        return None
    one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.int64))})
    shifted = ir.node("Add", [value, one.outputs[0]])
    shifted.metadata_props.update(use.node.metadata_props)
    model.graph.insert_before(use.node, [one, shifted])
    use.node.replace_input_with(use.idx, shifted.outputs[0])
    return _at(use.node, "positions + 1")


def half_precision(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One value rounded to half precision and back."""
    found = [
        n
        for n in model.graph
        if n.outputs[0].dtype == ir.DataType.FLOAT and n.op_type != "Constant"
    ]
    node = _pick(random, found)
    if node is None or node.outputs[0].is_graph_output():
        return None
    value = node.outputs[0]
    uses = list(value.uses())
    low = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)})
    back = ir.node("Cast", [low.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    for made in (low, back):
        made.metadata_props.update(node.metadata_props)
    model.graph.insert_after(node, [low, back])
    for use in uses:
        use.node.replace_input_with(use.idx, back.outputs[0])
    return _at(node, "half precision")


def int8_step(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """One int8 weight moved by one step."""
    chosen = _pick(random, _constants(model, (ir.DataType.INT8,)))
    if chosen is None:
        return None
    value, node = chosen
    array = _array(value).copy()
    index = tuple(int(random.integers(size)) for size in array.shape)
    array[index] += 1 if array[index] < 0 else -1
    _set(value, array)
    return _at(node, f"{value.name}{list(index)}")


def zero_point(model: ir.Model, random: Random) -> tuple[str, str] | None:
    """The zero point of an integer product left out, or one of the weights made up."""
    node = _pick(random, [n for n in model.graph if n.op_type == "MatMulInteger"])
    if node is None:
        return None
    if random.integers(2):
        node.resize_inputs(2)
        return _at(node, "no zero point")
    one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.int8))})
    model.graph.insert_before(node, one)
    node.resize_inputs(4)
    node.replace_input_with(3, one.outputs[0])
    return _at(node, "a zero point of the weights")


KINDS: dict[str, Mutation] = {
    "weight, one number × 1.01": weight_element,
    "weight, one row × 1.01": weight_row,
    "weight, all of it × 1.01": weight_tensor,
    "bias dropped": bias_dropped,
    "constant × 1.01": scalar_constant,
    "whole number off by one": off_by_one,
    "inputs swapped": swapped_inputs,
    "axis or permutation": changed_axis,
    "mask dropped": dropped_mask,
    "comparison in the mask": changed_mask,
    "activation": changed_activation,
    "Gelu approximation": gelu_approximation,
    "epsilon": altered_epsilon,
    "attention scale": attention_scale,
    "residual dropped": dropped_residual,
    "rotary embedding": changed_rotation,
    "positions + 1": shifted_positions,
    "rounded to half precision": half_precision,
    "int8 weight, one step": int8_step,
    "zero point": zero_point,
}


# --- verdicts -----------------------------------------------------------------------------------

_SHIPPED = "as shipped, "


def judge(
    subject: Subject,
    family: str,
    kind: str,
    random: Random,
    folder: Path,
    seen: set[tuple[str, str, str]],
) -> Outcome | None:
    """Mutate one thing and run the gate; None where there is nothing of this kind that was not seen."""
    model = subject.graph()
    told = KINDS[kind](model, random)
    if told is None or (family, kind, told[0]) in seen:
        return None
    seen.add((family, kind, told[0]))
    site, module = told[0], told[1].removeprefix("backbone.")
    path = folder / "mutated.onnx"
    try:
        ir.save(model, path)
        report = check_graphs(subject.checkpoint, {"model": (subject.part, path)})
    except ModelError as error:
        return Outcome(family, kind, site, module, "refused", proof=str(error)[:200])
    failed = [check for check in report.checks if not check.passed]
    rules = sorted({check.rule.split(":")[0] for check in failed})
    if all(c.rule.startswith(BROKEN) for c in report.checks if c.session != "file"):
        return Outcome(
            family, kind, site, module, "refused", tuple(rules), proof=failed[0].rule[:200]
        )
    if failed:
        where = (report.diverges or "").split(" (")[0]
        named = None
        if module and report.diverges:
            named = f"{where}.".startswith(f"{module}.") or f"{module}.".startswith(f"{where}.")
        return Outcome(family, kind, site, module, "caught", tuple(rules), named)
    equivalent, proof = prove(subject, path, folder)
    verdict = "equivalent" if equivalent else "missed"
    return Outcome(family, kind, site, module, verdict, proof=proof)


def prove(subject: Subject, mutated: Path, folder: Path) -> tuple[bool, str]:
    """Return whether no output moves by more than rounding, on a sample that the gate has not seen.

    Two correct graphs, each off by e, are √2 e apart, and at most 2 e in one element. An int8 graph
    is tried without its run-time rounding first.
    """
    original = folder / "original.onnx"
    original.write_bytes(subject.content)
    graphs = {"": (original, mutated)}
    if subject.part.quantization:
        paths = [linearized(path, folder / f"exact-{path.name}") for path in (original, mutated)]
        graphs = {"": (paths[0], paths[1])}
        graphs[_SHIPPED] = (original, mutated)
    part = dequantized(subject.part) if subject.part.quantization else subject.part
    double = copy.deepcopy(part.module).double()
    tokens = tokens_of(part)
    moved: dict[str, list[tuple[float, float]]] = {}
    rounding: dict[str, list[tuple[float, float]]] = {}
    sessions = {
        label: [open_session(path, optimize=False) for path in pair]
        for label, pair in graphs.items()
    }
    for case in _sample(part):
        with torch.inference_mode():
            exact = named_outputs(double, {k: _double(v) for k, v in case.items()})
        for label, pair in sessions.items():
            before, after = (run(session, case) for session in pair)
            for output in part.signature.outputs:
                a, b, y = (
                    tokens.real(output, array, case)
                    for array in (before[output], after[output], exact[output].numpy())
                )
                moved.setdefault(label + output, []).append(errors(b, a.astype(np.float64)))
                rounding.setdefault(label + output, []).append(errors(a, y))
    count = len(next(iter(moved.values())))
    largest = 0.0
    for output, listed in moved.items():
        difference, own = pooled_errors(listed), pooled_errors(rounding[output])
        told = (
            f"{output} moves by {difference[0]:.2g} rms, {difference[1]:.2g} at most; "
            f"its own error is {own[0]:.2g} and {own[1]:.2g}"
        )
        if output.startswith(_SHIPPED):
            # its own error is the quantization: only where nothing else moves must this stand still
            if difference != (0.0, 0.0) and not largest:
                return False, told
        elif difference[0] > 2**0.5 * own[0] or difference[1] > 2 * own[1]:
            return False, told
        largest = max(largest, difference[1])
    told = f"moves by {largest:.2g} at most" if largest else "every bit is the same"
    return True, f"{told}, over {count} other batches"


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _sample(part: Checkpoint) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield inputs that the gate has not used: other seeds, lengths and pasts."""
    random = np.random.default_rng(12345)
    for seed in range(1000, 1060):
        if not part.signature.has_sequence:
            yield part.signature.sample(16, seed=seed)
            continue
        longest = part.signature.longest or 48
        past = int(random.integers(longest - 1)) if part.signature.has_past and seed % 2 else 0
        length = 1 if past else int(random.integers(1, longest + 1))
        yield part.signature.sample(7, length, seed=seed, ragged=past + length > 1, past=past)


# --- the whole ----------------------------------------------------------------------------------


def mutations(count: int, seed: int) -> Iterator[Outcome]:
    """Yield outcomes until `count` different mutated graphs could be run."""
    subjects: dict[str, Subject] = {}
    seen: set[tuple[str, str, str]] = set()
    names = list(FAMILIES)
    ran, index = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while ran < count:
            random = np.random.default_rng([seed, index])
            family, index = names[index % len(names)], index + 1
            if family not in subjects:
                subjects[family] = build(family)
            outcome = None
            for kind in random.permutation(list(KINDS)):
                outcome = judge(subjects[family], family, str(kind), random, Path(folder), seen)
                if outcome is not None:
                    break
            assert outcome is not None  # every graph has weights
            ran += outcome.verdict != "refused"
            yield outcome


def summary(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """Return the counts per kind, the shares and every mutation that was not caught."""
    kinds = {}
    for kind in KINDS:
        verdicts = Counter(o.verdict for o in outcomes if o.kind == kind)
        by_outputs = sum(_by_outputs(o) for o in outcomes if o.kind == kind)
        if verdicts:
            kinds[kind] = {**verdicts, "caught by outputs alone": by_outputs}
    verdicts = Counter(o.verdict for o in outcomes)
    judged = verdicts["caught"] + verdicts["missed"]
    named = [o.named for o in outcomes if o.named is not None]
    return {
        "seed": seed,
        "versions": versions(),
        "tried": len(outcomes),
        **{name: verdicts[name] for name in ("caught", "missed", "equivalent", "refused")},
        "share": verdicts["caught"] / judged if judged else None,
        "share by outputs alone": sum(map(_by_outputs, outcomes)) / judged if judged else None,
        "module named": {"right": sum(named), "of": len(named)},
        "kinds": kinds,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def _by_outputs(outcome: Outcome) -> bool:
    return outcome.verdict == "caught" and set(outcome.rules) != {"same bits"}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the summary as a page."""
    columns = ("caught", "caught by outputs alone", "missed", "equivalent", "refused")
    lines = [
        "# Mutations of graphs, and the parity gate",
        "",
        f"`python -m benchmarks.gate_mutations --count {report['tried'] - report['refused']} "
        f"--seed {report['seed']}`",
        "",
        f"{report['caught']} caught, {report['missed']} missed: **{report['share']:.1%}** "
        f"({report['share by outputs alone']:.1%} by the outputs alone, without comparing weights). "
        f"{report['equivalent']} more change no output beyond its rounding, and {report['refused']} "
        "left no graph that runs. The report named the module that was touched, one inside it or "
        f"one around it in {report['module named']['right']} of {report['module named']['of']} cases.",
        "",
        "| kind | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| {kind} | " + " | ".join(str(row.get(c, 0)) for c in columns) + " |"
            for kind, row in report["kinds"].items()
        ),
    ]
    for verdict in ("missed", "equivalent"):
        listed = [o for o in report["outcomes"] if o["verdict"] == verdict]
        lines += ["", f"## {verdict.capitalize()}: {len(listed)}", ""]
        lines += [f"- {o['family']}, {o['kind']}: {o['site']}; {o['proof']}" for o in listed]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write `mutations.json` and `mutations.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for outcome in mutations(options.count, options.seed):
        outcomes.append(outcome)
        if outcome.verdict != "caught":
            print(f"{len(outcomes)} {outcome}", flush=True)
    report = summary(outcomes, options.seed)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "mutations.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "mutations.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
