"""A session whose inputs and outputs stay on the device, so that a call's time is the device's own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort

from export.sessions import BFLOAT16, array_of, value_of, widened

GRAPHS = {"enable_cuda_graph": "1"}  # an option of the CUDA provider


@dataclass(frozen=True)
class Feed:
    """What a call runs on: buffers bound to inputs and outputs, and how to run it."""

    binding: Any
    options: Any
    values: tuple[Any, ...]  # the inputs' buffers


class BoundSession:
    """Runs a session on buffers of its device ("cpu", "cuda").

    With `graphs`, which the session has to be opened for (`GRAPHS`), each feed's kernels are recorded
    once and launched together from then on.
    """

    def __init__(self, session: ort.InferenceSession, device: str, graphs: bool = False) -> None:
        self._session, self._device, self._graphs = session, device, graphs
        # NumPy has no bfloat16 that ONNX Runtime would copy for us
        self._places = {
            item.name: "cpu" if item.type == BFLOAT16 else device for item in session.get_outputs()
        }
        self._recorded: dict[tuple[tuple[str, tuple[int, ...]], ...], Feed] = {}

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Feed:
        """Put a complete feed's arrays on the device; where kernels are recorded, into those buffers."""
        if not self._graphs:
            return self._feed(inputs)
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(self._feed(inputs), len(self._recorded))
        feed = self._recorded[shapes]
        for value, array in zip(feed.values, inputs.values(), strict=True):
            value.update_inplace(array)
        return feed

    def _feed(self, inputs: Mapping[str, np.ndarray]) -> Feed:
        """Return the inputs in buffers of their own."""
        values = {name: value_of(array, self._device) for name, array in inputs.items()}
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, place in self._places.items():
            binding.bind_output(name, place)
        binding.synchronize_inputs()
        return Feed(binding, ort.RunOptions(), tuple(values.values()))

    def _record(self, feed: Feed, number: int) -> Feed:
        """Return the feed with outputs that stay where they are; its next run is recorded."""
        self._session.run_with_iobinding(feed.binding, _graph(-1))  # which makes the outputs
        made = feed.binding.get_outputs()
        feed.binding.clear_binding_outputs()
        for name, value in zip(self._places, made, strict=True):
            feed.binding.bind_ortvalue_output(name, value)
        return replace(feed, options=_graph(number))

    def run(self, feed: Feed) -> Feed:
        """Compute the outputs, and wait for the device to be done."""
        self._session.run_with_iobinding(feed.binding, feed.options)
        feed.binding.synchronize_outputs()
        return feed

    def collect(self, feed: Feed) -> dict[str, np.ndarray]:
        """Return the outputs by name, brought to the host."""
        values = feed.binding.get_outputs()
        pairs = zip(self._places, values, strict=True)
        return {name: widened(array_of(value)) for name, value in pairs}


def _graph(number: int) -> Any:
    """Return the options of a run that records a CUDA graph, or launches it; -1 does neither."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
