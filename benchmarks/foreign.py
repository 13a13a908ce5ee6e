"""Graphs of other tools: what they compute under other names, or leave to their users."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.runtimes import Arrays, Source
from benchmarks.worker import WorkerError


def completed(outputs: Arrays, inputs: Mapping[str, Any], reference: Source) -> Arrays:
    """Return outputs of a graph with the one that the baseline is about, where it follows from them.

    A graph that ends in hidden states, (batch, sequence, width), is pooled as the baseline is. Where
    nothing fits, the outputs are returned as they are. Raises `WorkerError` for hidden states that the
    baseline cannot pool.
    """
    name = reference.output
    if name is None or name in outputs or reference.head is None:
        return outputs
    hidden = next((values for values in outputs.values() if np.ndim(values) == 3), None)
    if hidden is None or "attention_mask" not in inputs:
        return outputs
    mask = np.asarray(inputs["attention_mask"])
    try:
        return {**outputs, name: reference.head(hidden.astype(np.float32), mask)}
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"its hidden states {hidden.shape} cannot be pooled: {error}") from error
