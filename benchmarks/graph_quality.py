"""What the sentence embeddings of a graph are worth, whoever made it and wherever it ends."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.config import usable_cores
from benchmarks.runtimes import Place
from benchmarks.worker import Variant, Worker, WorkerError
from compress.checkpoint import Checkpoint

Predict = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]


def spearman_of(graph: Path, checkpoint: Checkpoint, examples: Any) -> float:
    """Return 100 × Spearman's correlation of scores and of cosines of the graph's embeddings.

    `checkpoint` is the graph's source. Raises `WorkerError` where the graph cannot be run, or gives
    what is no number.
    """
    from calib_data.metrics import measure_metric

    with Worker(Variant(graph.stem, str(graph), "onnx"), Place("cpu", usable_cores())) as worker:
        worker.load()
        return measure_metric(
            "spearman",
            with_head(checkpoint, worker.predict),
            examples,
            checkpoint.processor,
            task=checkpoint.task,
            max_length=checkpoint.max_length,
        ).value


def with_head(checkpoint: Checkpoint, predict: Predict) -> Predict:
    """Return a predictor of sentence embeddings, pooled by the checkpoint where the graph does not.

    Such a graph's first output is its hidden states, (batch, sequence, width). Raises `WorkerError` for
    embeddings that are not finite.
    """
    import torch

    name = str(checkpoint.output)

    def call(batch: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
        outputs = predict(batch)
        if name not in outputs:
            hidden = torch.from_numpy(next(iter(outputs.values())))
            embed: Any = checkpoint.module.embed
            mask = torch.as_tensor(batch["attention_mask"])
            outputs = {name: embed(hidden, mask).detach().numpy()}
        if not np.isfinite(outputs[name]).all():
            raise WorkerError("it gives what is no finite number")
        return outputs

    return call
