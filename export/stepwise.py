"""Decoding step by step with a cache, held against the whole text at once without one.

The gate compares a graph with cache with a wrapper around the model; this proves the wrapper.
"""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.fresh import unchanged
from compress.quantize import dequantized
from compress.signature import forward_names, named_outputs, positions_from
from export.cases import longest_case
from export.linearize import linearized
from export.precision import precision
from export.rounding import Rounded, exactly
from export.sessions import open_session, run
from export.tolerance import (
    DRAWS,
    FIRST_DRAWS,
    HOPELESS,
    Finding,
    deviation,
    finding,
    scale_for,
)
from export.trial import SESSIONS
from export.verdict import Check, broken

Run = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]
ROWS, PROMPT, STEPS = 3, 11, 6


@dataclass(frozen=True)
class Text:
    """A batch of texts: what the decoder reads, and what the encoder reads where there is one."""

    ids: Tensor  # (batch, sequence), of the decoder
    mask: Tensor  # (batch, sequence), padded on the left
    encoder: Mapping[str, Tensor]

    @property
    def prompt(self) -> int:
        """How many tokens go in at once before the single steps."""
        return max(self.ids.shape[1] - STEPS, 1)


def check_across_calls(
    checkpoint: Checkpoint, graphs: Mapping[str, tuple[Checkpoint, Path]], provider: str = "cpu"
) -> Iterator[Check]:
    """Yield checks of prompt and single steps with a cache against the whole text without one."""
    pair = pair_of({name: part for name, (part, _) in graphs.items()})
    if pair is None:
        return
    decoder, encoder = pair
    text = text_for(graphs[decoder][0], graphs[encoder][0] if encoder else None)
    real = text.mask.bool().numpy()
    exact = dequantized(checkpoint) if checkpoint.quantization else checkpoint
    kind = precision(graphs[decoder][0].module)
    module = exact.backbone
    if precision(module) != kind:
        module = copy.deepcopy(module).to(kind)
    with exactly():
        y = at_once(exact, module, text)[real]
    scale = scale_for(y, kind)

    def judge(found: np.ndarray) -> Finding:
        away = deviation(found, y)
        comparisons = SESSIONS * (1 + 2 * away.rows.size)
        while scale.draws < FIRST_DRAWS or (
            scale.draws < DRAWS
            and not (told := finding(away, scale, comparisons)).passed
            and told.strain < HOPELESS
        ):
            with Rounded(scale.draws):
                scale.add(deviation(at_once(exact, module, text)[real], y))
        return finding(away, scale, comparisons)

    case = f"prompt of {text.prompt} and {text.ids.shape[1] - text.prompt} steps"
    with tempfile.TemporaryDirectory() as folder:
        # int8 as it ships rounds by all tokens at once, so only the weights can be compared
        paths = {
            name: linearized(graphs[name][1], Path(folder, f"{name}.onnx"))
            if checkpoint.quantization
            else graphs[name][1]
            for name in pair
            if name is not None
        }
        for label, optimize in (("plain", False), ("optimized", True)):
            runs = {
                name: functools.partial(
                    run, open_session(path, provider, optimize=optimize, tf32=False)
                )
                for name, path in paths.items()
            }
            rule, found = "across calls", np.zeros(0)
            try:
                made = step_by_step(runs[decoder], runs[encoder] if encoder else None, text)
                found = made[real] if made.shape[:2] == real.shape else made
            except Exception as reason:  # the pybind exceptions have no common base
                rule = broken(reason)
            where = (decoder, case, f"{provider} {label}", "logits")
            yield Check.judged(where, rule, judge(found))


def text_for(decoder: Checkpoint, encoder: Checkpoint | None) -> Text:
    """Return ragged texts; without padding for a decoder that takes no mask of its own."""
    length = min(PROMPT + STEPS, longest_case(decoder))
    has_mask = "attention_mask" in decoder.signature.names
    sample = decoder.signature.sample(ROWS, length, seed=1, ragged=has_mask or encoder is not None)
    ids = sample["input_ids"]
    mask = sample["attention_mask"] if has_mask else torch.ones_like(ids)
    own = encoder.signature.sample(ROWS, length, seed=2, ragged=True) if encoder else {}
    return Text(ids, mask, own)


def at_once(checkpoint: Checkpoint, module: nn.Module, text: Text) -> np.ndarray:
    """Return the logits (batch, sequence, vocabulary) of the whole text, without a cache.

    `module` is the checkpoint's backbone in some precision. An encoder-decoder takes its own names.
    """
    inputs: dict[str, Any]
    if text.encoder:
        inputs = {**text.encoder, "decoder_input_ids": text.ids}
    else:
        inputs = {"input_ids": text.ids, "attention_mask": text.mask}
        if "position_ids" in forward_names(checkpoint.backbone):
            inputs["position_ids"] = positions_from(text.mask, text.ids.shape[1])
    inputs["use_cache"] = False
    with torch.inference_mode(), unchanged(module):
        logits = named_outputs(module, inputs)["logits"]
    return (logits if logits.dtype == torch.float64 else logits.float()).numpy()


def step_by_step(decoder: Run, encoder: Run | None, text: Text) -> np.ndarray:
    """Return the same logits from a prompt and single steps, each given the cache of the last."""
    length = text.ids.shape[1]
    fixed: dict[str, Any] = {}
    if encoder is not None:
        fixed["encoder_hidden_states"] = encoder(text.encoder)["last_hidden_state"]
        fixed["encoder_attention_mask"] = text.encoder["attention_mask"]
    past: dict[str, np.ndarray] = {}
    logits = []
    ends = [text.prompt, *range(text.prompt + 1, length + 1)]
    for start, end in zip([0, *ends], ends):
        mask = text.mask[:, :end]
        outputs = decoder(
            {
                **fixed,
                **past,
                "input_ids": text.ids[:, start:end],
                "attention_mask": mask,
                "position_ids": positions_from(mask, end - start),
                "use_cache_branch": torch.tensor([start > 0]),
            }
        )
        logits.append(outputs["logits"])
        for name, value in outputs.items():
            if name.startswith("present.") and not (start and ".encoder." in name):
                past[name.replace("present.", "past_key_values.", 1)] = value
    return np.concatenate(logits, axis=1)


def pair_of(parts: Mapping[str, Checkpoint]) -> tuple[str, str | None] | None:
    """Return the names of the graph with a cache and of the encoder it needs, if they are there."""
    decoders = [name for name, part in parts.items() if part.signature.has_past]
    if not decoders:
        return None
    needs = {item.kind for item in parts[decoders[0]].signature.inputs}
    if "hidden" not in needs:
        return decoders[0], None
    encoders = [n for n, p in parts.items() if "last_hidden_state" in p.signature.outputs]
    return (decoders[0], encoders[0]) if encoders else None
