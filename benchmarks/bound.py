"""A session whose inputs and outputs stay on the device, so that a call's time is the device's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from export.sessions import array_of, value_of, widened

GRAPHS = {"enable_cuda_graph": "1"}  # an option of the CUDA provider


@dataclass(frozen=True)
class Feed:
    """What a call runs on: buffers bound to inputs and outputs, and how to run it."""

    binding: Any
    options: Any


class BoundSession:
    """Runs a session on buffers of its device ("cpu", "cuda").

    With `graphs`, which the session has to be opened for (`GRAPHS`), each feed's kernels are recorded
    once and launched together from then on.
    """

    def __init__(self, session: ort.InferenceSession, device: str, graphs: bool = False) -> None:
        self._session, self._device, self._graphs = session, device, graphs
        self._names = [item.name for item in session.get_outputs()]
        self._feeds = 0

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Feed:
        """Put a complete feed's arrays on the device."""
        options = ort.RunOptions()
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, value_of(array, self._device))
        for name in self._names:
            binding.bind_output(name, self._device)
        binding.synchronize_inputs()
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", "-1")  # this run is not recorded
            self._session.run_with_iobinding(binding, options)
            made = binding.get_outputs()
            binding.clear_binding_outputs()
            for name, value in zip(self._names, made, strict=True):  # what is recorded writes there
                binding.bind_ortvalue_output(name, value)
            self._feeds += 1
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(self._feeds))
        return Feed(binding, options)

    def run(self, feed: Feed) -> Feed:
        """Compute the outputs, and wait for the device to be done."""
        self._session.run_with_iobinding(feed.binding, feed.options)
        feed.binding.synchronize_outputs()
        return feed

    def collect(self, feed: Feed) -> dict[str, np.ndarray]:
        """Return the outputs by name, brought to the host."""
        values = feed.binding.get_outputs()
        pairs = zip(self._names, values, strict=True)
        return {name: widened(array_of(value)) for name, value in pairs}
