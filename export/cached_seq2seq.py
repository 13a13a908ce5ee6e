"""Encoder–decoders with a key/value cache: an encoder, and one decoder that serves prompt and step.

The decoder's graph is what `optimum` calls merged, with each weight once. `use_cache_branch` says
whether there is a cache. Where there is, keys and values of the encoder's states are taken from it;
where there is none, they are computed, and what the cache inputs hold is ignored.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from compress.checkpoint import Checkpoint
from compress.signature import Input, forward_names
from compress.wrapper import Wrapper
from export.cached import KINDS, PROBED, Layer, contents, layer_shapes, past_input, probe

FLAG = "use_cache_branch"
_AXES = ("past_sequence", "encoder_sequence")  # of the decoder's own cache, and of the encoder's
_BRANCHES = ("then_branch", "else_branch")


@torch.library.custom_op("onnxpress::choose", mutates_args=())
def choose(flag: Tensor, past: Tensor, new: Tensor) -> Tensor:
    """Return `past` where `flag` (1,) holds, else `new`; they may differ in length (axis 2)."""
    return (past if bool(flag) else new).clone()


@choose.register_fake
def _(flag: Tensor, past: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(new)


class Encoder(Wrapper):
    """The encoder of an encoder–decoder."""

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return last_hidden_state (batch, sequence, hidden)."""
        backbone: Any = self.backbone
        return {"last_hidden_state": backbone.get_encoder()(**inputs).last_hidden_state}


class CachedSeq2SeqDecoder(Wrapper):
    """The decoder of an encoder–decoder, which takes and returns its cache as named tensors."""

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return logits (batch, sequence, vocabulary) and present.N.decoder|encoder.key|value.

        Keys and values have shape (batch, heads, length, width), where the length is the decoder's
        total, or the encoder's sequence.
        """
        flag = inputs[FLAG]
        own = [value for name, value in inputs.items() if ".decoder." in name]
        cross = [value for name, value in inputs.items() if ".encoder." in name]
        if not torch.compiler.is_exporting():  # a graph is traced as a step: see `branch_on_cache_`
            own = [value[:, :, : value.shape[2] * int(flag)] for value in own]
        grown = [Layer(k, v, k.shape[2], _appended) for k, v in zip(own[::2], own[1::2])]
        chosen = [
            Layer(k, v, 0, lambda past, new: choose(flag, past, new))
            for k, v in zip(cross[::2], cross[1::2])
        ]
        states: Any = inputs["encoder_hidden_states"]
        result = self.backbone(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inputs["encoder_attention_mask"],
            decoder_input_ids=inputs["input_ids"],
            past_key_values=EncoderDecoderCache(Cache(layers=[*grown]), Cache(layers=[*chosen])),
            use_cache=True,
        )
        presents = contents("present.{}.decoder.{}", grown)
        presents |= contents("present.{}.encoder.{}", chosen)
        return {"logits": result.logits, **presents}


def _appended(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], dim=2)


def encoder_and_decoder(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the encoder and the decoder with cache; nothing where there is no cache of both."""
    needed = {"encoder_outputs", "past_key_values", "attention_mask", "decoder_input_ids"}
    if not needed <= set(forward_names(checkpoint.backbone)):
        return {}
    cache = probe(checkpoint)
    own = layer_shapes(getattr(cache, "self_attention_cache", None), PROBED)
    cross = layer_shapes(getattr(cache, "cross_attention_cache", None), PROBED)
    if not own or len(own) != len(cross):
        return {}
    taken = tuple(item for item in checkpoint.signature.inputs if item.name != "decoder_input_ids")
    encoder = replace(
        checkpoint,
        module=Encoder(checkpoint.backbone).eval(),
        signature=replace(checkpoint.signature, inputs=taken, outputs=("last_hidden_state",)),
    )
    hidden = encoder.forward(encoder.signature.sample(1, PROBED))["last_hidden_state"].shape[2]
    of_encoder = ((0, "batch"), (1, "encoder_sequence"))
    inputs = [
        Input("encoder_attention_mask", "mask", of_encoder, (2, 16)),
        Input("input_ids", "ids", ((0, "batch"), (1, "sequence")), (2, 16)),
        Input("encoder_hidden_states", "hidden", of_encoder, (2, 16, int(hidden)), "float32"),
    ]
    outputs = ["logits"]
    for index, sides in enumerate(zip(own, cross)):
        for side, axis, pair in zip(("decoder", "encoder"), _AXES, sides):
            for kind, shape in zip(KINDS, pair):
                name = f"{index}.{side}.{kind}"
                inputs.append(past_input(f"past_key_values.{name}", shape, axis))
                outputs.append(f"present.{name}")
    inputs.append(Input(FLAG, "flag", (), (1,), "bool"))
    decoder = replace(
        checkpoint,
        module=CachedSeq2SeqDecoder(checkpoint.backbone).eval(),
        signature=replace(checkpoint.signature, inputs=tuple(inputs), outputs=tuple(outputs)),
        processor=None,
    )
    return {"encoder_model": encoder, "decoder_model_merged": decoder}


# --- the graph ----------------------------------------------------------------------------------


def branch_on_cache_(model: ir.Model) -> int:
    """Let a decoder's graph ignore the cache where `use_cache_branch` is false.

    Return how many nodes run in that case only.

    The tracer leaves a decoder that reads its own past whole, and for every layer an `If` between
    the encoder's keys or values in the cache and those it has computed in any case. Here the past is
    cut to nothing where there is none, and the choices become one `If` that holds what they computed.
    """
    flag = next((value for value in model.graph.inputs if value.name == FLAG), None)
    if flag is None:
        return 0
    _cut_past_(model, flag)
    return _join_branches_(model, flag)


def _cut_past_(model: ir.Model, flag: ir.Value) -> None:
    """Let past × flag positions be read of every input `past_key_values.N.decoder.*`."""
    readers = {
        value: list(value.uses()) for value in model.graph.inputs if ".decoder." in str(value.name)
    }
    size = ir.node("Shape", [next(iter(readers))], {"start": 2, "end": 3})
    number = ir.node("Cast", [flag], {"to": int(ir.DataType.INT64)})
    end = ir.node("Mul", [size.outputs[0], number.outputs[0]])
    start = ir.node("Constant", [], {"value": ir.tensor([0], dtype=ir.DataType.INT64)})
    axis = ir.node("Constant", [], {"value": ir.tensor([2], dtype=ir.DataType.INT64)})
    nodes = [size, number, end, start, axis]
    for value, uses in readers.items():
        cut = ir.node("Slice", [value, start.outputs[0], end.outputs[0], axis.outputs[0]])
        cut.outputs[0].shape, cut.outputs[0].type = value.shape, value.type
        for use in uses:
            use.node.replace_input_with(use.idx, cut.outputs[0])
        nodes.append(cut)
    model.graph.insert_before(model.graph[0], nodes)


def _join_branches_(model: ir.Model, flag: ir.Value) -> int:
    """Make one `If` of all that `flag` decides, with what only one of them needs inside it."""
    choices = [n for n in model.graph if n.op_type == "If" and n.inputs[0] is flag]
    pairs = [[_passed_on(choice, name) for choice in choices] for name in _BRANCHES]
    lazy = {
        user.node for value in pairs[1] for user in value.uses() if user.node.graph != model.graph
    }
    for node in reversed(list(model.graph)):
        users = [use.node for value in node.outputs for use in value.uses()]
        if users and lazy.issuperset(users) and not any(v.is_graph_output() for v in node.outputs):
            lazy.add(node)
    inside = [node for node in model.graph if node in lazy]
    joined = ir.node("If", [flag], {}, num_outputs=len(choices))
    model.graph.insert_before(choices[0], joined)
    model.graph.remove(inside)
    for name, values, nodes in zip(_BRANCHES, pairs, ([], inside)):
        results = [ir.node("Identity", [value]) for value in values]
        for result, choice in zip(results, choices):
            result.outputs[0].name = f"{choice.outputs[0].name}_{name}"
        branch = ir.Graph([], [r.outputs[0] for r in results], nodes=[*nodes, *results], name=name)
        joined.attributes.add(ir.AttrGraph(name, branch))
    for choice, new in zip(choices, joined.outputs):
        old = choice.outputs[0]
        name = str(old.name)
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{name}_unjoined", name
    model.graph.remove(choices, safe=True)
    return len(inside)


def _passed_on(choice: ir.Node, branch: str) -> ir.Value:
    """Return the outer value that a branch of `choose` passes on."""
    node = choice.attributes[branch].as_graph().outputs[0].producer()
    assert node is not None
    assert node.op_type == "Identity"
    value = node.inputs[0]
    assert value is not None
    return value
