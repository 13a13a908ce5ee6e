"""Decoding over ONNX Runtime: the cache stays where the runtime put it, from prompt to last token.

A decoder here has two calls, `start` with a batch of prompts and `step` with one token a row; both
return the logits of the next token, (batch, vocabulary).
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnx.helper import np_dtype_to_tensor_dtype

from export.sessions import array_of, open_session, positions_from, zeros

IN_PLACE = "onnxpress.cache"  # metadata of a graph whose attention appends to a buffer with room


class Decoding(Protocol):
    """What generation needs of a model."""

    def start(self, ids: np.ndarray, mask: np.ndarray, room: int) -> np.ndarray:
        """Take prompts (batch, sequence), padded where the mask is 0, with room for more tokens."""
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token a row, (batch,)."""
        ...


class CachedDecoding:
    """A decoder-only graph. Prompts are padded on the left.

    Where the graph appends in place, past and present are bound to one buffer as long as the whole
    text will be, so that a step writes one position and copies nothing. Elsewhere the present that
    the runtime made is handed back as the next past, without a detour through NumPy.
    """

    def __init__(self, model: Path, provider: str = "cpu", threads: int | None = None) -> None:
        self.session = open_session(model, provider, threads)
        self.device = "cpu" if provider == "cpu" else "cuda"
        self.binding = self.session.io_binding()
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.in_place = IN_PLACE in self.session.get_modelmeta().custom_metadata_map
        self.mask = np.zeros((0, 0), np.int64)

    def start(self, ids: np.ndarray, mask: np.ndarray, room: int) -> np.ndarray:
        """Take prompts (batch, sequence), padded where the mask is 0, with room for more tokens."""
        batch, length = ids.shape
        self.mask = mask
        self.binding = self.session.io_binding()
        for name in self.past:
            _, heads, _, width = self.inputs[name].shape
            size = length + room if self.in_place else 0
            buffer = _buffer((batch, heads, size, width), self.inputs[name], self.device)
            self.binding.bind_ortvalue_input(name, buffer)
            if self.in_place:
                self.binding.bind_ortvalue_output(_present(name), buffer)
        return self._run(ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token a row, (batch,)."""
        self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None])

    def _run(self, ids: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids, "attention_mask": self.mask}
        if "position_ids" in self.inputs:
            feed["position_ids"] = positions_from(self.mask, ids.shape[1])
        for name, value in feed.items():
            self.binding.bind_cpu_input(name, np.ascontiguousarray(value))
        if not self.in_place:
            for name in self.past:  # bound anew: its shape grows
                self.binding.bind_output(_present(name), self.device)
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        outputs = dict(zip(self._bound(), self.binding.get_outputs()))
        if not self.in_place:
            for name in self.past:
                self.binding.bind_ortvalue_input(name, outputs[_present(name)])
        return _last(outputs["logits"])

    def _bound(self) -> list[str]:
        """Return the outputs' names in the order in which they were first bound."""
        return [*(_present(name) for name in self.past), "logits"]


class Seq2SeqDecoding:
    """An encoder graph and a merged decoder graph. Sources are padded on the right."""

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        start_token: int,
        provider: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.encoder = open_session(encoder, provider, threads)
        self.session = open_session(decoder, provider, threads)
        self.device = "cpu" if provider == "cpu" else "cuda"
        self.start_token = start_token
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.binding = self.session.io_binding()

    def start(self, ids: np.ndarray, mask: np.ndarray, room: int) -> np.ndarray:
        """Encode sources (batch, sequence) and take the start token; the cache grows by itself."""
        names = {item.name for item in self.encoder.get_inputs()}
        feed = {"input_ids": ids, "attention_mask": mask}
        binding = self.encoder.io_binding()
        for name in names:
            binding.bind_cpu_input(name, np.ascontiguousarray(feed[name]))
        binding.bind_output("last_hidden_state", self.device)
        self.encoder.run_with_iobinding(binding)
        self.binding = self.session.io_binding()
        if "encoder_hidden_states" in self.inputs:
            self.binding.bind_ortvalue_input("encoder_hidden_states", binding.get_outputs()[0])
        if "encoder_attention_mask" in self.inputs:
            self.binding.bind_cpu_input("encoder_attention_mask", np.ascontiguousarray(mask))
        for name in self.past:
            _, heads, _, width = self.inputs[name].shape
            empty = _buffer((ids.shape[0], heads, 0, width), self.inputs[name], self.device)
            self.binding.bind_ortvalue_input(name, empty)
        first = np.full((ids.shape[0], 1), self.start_token, np.int64)
        return self._run(first, [_present(name) for name in self.past], use_cache=False)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token a row, (batch,)."""
        growing = [_present(name) for name in self.past if ".decoder." in name]
        return self._run(tokens[:, None], growing, use_cache=True)

    def _run(self, ids: np.ndarray, kept: list[str], use_cache: bool) -> np.ndarray:
        self.binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        self.binding.bind_cpu_input("use_cache_branch", np.array([use_cache]))
        self.binding.clear_binding_outputs()
        for name in kept:
            self.binding.bind_output(name, self.device)
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        *cache, logits = self.binding.get_outputs()
        for name, value in zip(kept, cache):
            self.binding.bind_ortvalue_input(name.replace("present", "past_key_values"), value)
        return _last(logits)


def _last(logits: Any) -> np.ndarray:
    """Return the logits of the last token, (batch, vocabulary), as float32."""
    return array_of(logits)[:, -1].astype(np.float32, copy=False)


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


def _buffer(shape: tuple[int, ...], item: ort.NodeArg, device: str) -> Any:
    """Return a buffer of zeros on the device, of the type of `item`."""
    array = zeros(shape, item)
    element = np_dtype_to_tensor_dtype(array.dtype)
    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, element, device, 0)
    # as bits: of NumPy's types ONNX Runtime takes all but the bfloat16 that ml_dtypes adds
    value.update_inplace(array.view(f"u{array.itemsize}"))
    return value
