"""Decoding over ONNX Runtime: the cache stays where the runtime put it, from prompt to last token.

A decoder here has two calls, `start` with a batch of prompts and `step` with one token a row; both
return the logits of the next token, (batch, vocabulary).
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnx.helper import np_dtype_to_tensor_dtype

from export.sessions import array_of, open_session, positions_from, value_of, zeros

_ENCODED = "last_hidden_state"  # the encoder's output, which the decoder has a name of its own for
_HELD = {_ENCODED: "encoder_hidden_states"}
IN_PLACE = "onnxpress.cache"  # metadata of a graph whose attention appends to a buffer with room


class Decoding(Protocol):
    """What generation needs of a model."""

    def start(self, ids: np.ndarray, mask: np.ndarray, room: int) -> np.ndarray:
        """Take prompts (batch, sequence), padded where the mask is 0, with room for more tokens."""
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token a row, (batch,)."""
        ...

    def reorder(self, rows: np.ndarray) -> None:
        """Go on from these rows of the batch, (rows,): some may be dropped, some taken twice."""
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
        self.cache: dict[str, ort.OrtValue] = {}
        self.mask = np.zeros((0, 0), np.int64)

    def start(self, ids: np.ndarray, mask: np.ndarray, room: int) -> np.ndarray:
        """Take prompts (batch, sequence), padded where the mask is 0, with room for more tokens."""
        batch, length = ids.shape
        self.mask = mask
        self.binding = self.session.io_binding()
        for name in self.past:
            _, heads, _, width = self.inputs[name].shape
            size = length + room if self.in_place else 0
            self._hold(name, _buffer((batch, heads, size, width), self.inputs[name], self.device))
        return self._run(ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token a row, (batch,)."""
        self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None])

    def reorder(self, rows: np.ndarray) -> None:
        """Go on from these rows of the batch, (rows,)."""
        self.mask = self.mask[rows]
        for name in self.past:
            self._hold(name, _rows(self.cache[name], rows, self.device))

    def _hold(self, name: str, value: ort.OrtValue) -> None:
        self.cache[name] = value
        self.binding.bind_ortvalue_input(name, value)
        if self.in_place:
            self.binding.bind_ortvalue_output(_present(name), value)

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
                self._hold(name, outputs[_present(name)])
        return _last(outputs["logits"])

    def _bound(self) -> list[str]:
        """Return the outputs' names in the order in which they were first bound."""
        return [*(_present(name) for name in self.past), "logits"]


class Seq2SeqDecoding:
    """An encoder graph and a merged decoder graph. Sources are padded on the right."""

    def __init__(
        self, encoder: Path, decoder: Path, provider: str = "cpu", threads: int | None = None
    ) -> None:
        self.encoder = open_session(encoder, provider, threads)
        self.session = open_session(decoder, provider, threads)
        self.device = "cpu" if provider == "cpu" else "cuda"
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.binding = self.session.io_binding()
        self.cache: dict[str, ort.OrtValue] = {}
        self.mask = np.zeros((0, 0), np.int64)

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Encode sources (batch, sequence), padded where the mask is 0, for what is to be written."""
        feed = {"input_ids": ids, "attention_mask": mask}
        binding = self.encoder.io_binding()
        for item in self.encoder.get_inputs():
            binding.bind_cpu_input(item.name, np.ascontiguousarray(feed[item.name]))
        binding.bind_output(_ENCODED, self.device)
        self.encoder.run_with_iobinding(binding)
        self.binding = self.session.io_binding()
        self.cache = {}
        self._hold(_ENCODED, binding.get_outputs()[0])
        self._hold_mask(mask)

    def start(self, ids: np.ndarray, mask: np.ndarray, room: int) -> np.ndarray:
        """Take the first tokens (batch, sequence) of what is written; the cache grows by itself."""
        for name in self.past:
            _, heads, _, width = self.inputs[name].shape
            shape = (ids.shape[0], heads, 0, width)
            self._hold(name, _buffer(shape, self.inputs[name], self.device))
        return self._run(ids, [_present(name) for name in self.past], use_cache=False)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token a row, (batch,)."""
        growing = [_present(name) for name in self.past if ".decoder." in name]
        return self._run(tokens[:, None], growing, use_cache=True)

    def reorder(self, rows: np.ndarray) -> None:
        """Go on from these rows of the batch, (rows,)."""
        for name, value in self.cache.items():
            self._hold(name, _rows(value, rows, self.device))
        self._hold_mask(self.mask[rows])

    def _hold(self, name: str, value: ort.OrtValue) -> None:
        self.cache[name] = value
        name = _HELD.get(name, name)
        if name in self.inputs:
            self.binding.bind_ortvalue_input(name, value)

    def _hold_mask(self, mask: np.ndarray) -> None:
        self.mask = mask
        if "encoder_attention_mask" in self.inputs:
            self.binding.bind_cpu_input("encoder_attention_mask", np.ascontiguousarray(mask))

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
            self._hold(name.replace("present", "past_key_values"), value)
        return _last(logits)


def _rows(value: ort.OrtValue, rows: np.ndarray, device: str) -> ort.OrtValue:
    """Return the rows of a value's first axis, on the same device."""
    return value_of(np.ascontiguousarray(array_of(value)[rows]), device)


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
