"""How good a model is on data held out, by the metrics that benchmarks use."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calib_data.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from calib_data.batches import Predict
    from calib_data.metrics import Measured
    from calib_data.sources import Examples
    from compress.checkpoint import Checkpoint


@dataclass(frozen=True)
class Judge:
    """A metric on data held out, and its name."""

    metric: str
    measure: Callable[["Checkpoint"], "Measured"]

    def __call__(self, checkpoint: "Checkpoint") -> float:
        """Return the metric as a figure that is higher the better: less is better with a minus."""
        found = self.measure(checkpoint)
        return found.value if found.higher_is_better else -found.value


def judge_of(
    reference: "Checkpoint",
    examples: "Examples",
    metric: str | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = 128,
) -> Judge:
    """Return what judges a model that stands in for `reference`.

    Without `metric` it is the first that the data's columns and the task allow: one of labels or scores
    if there are some, otherwise how near the model comes to the reference. Raises `DataError` where none
    fits; whether the one named fits shows when it is measured.
    """
    from calib_data.metrics import default_metrics, measure_metric
    from onnxpress.stages import with_labels_of

    examples = with_labels_of(reference, examples)
    fitting = (metric,) if metric else default_metrics(reference.task, examples.roles, True)
    if not fitting:
        raise DataError(f"no metric fits {reference.task} and {examples.spec}; use other data")
    expected = _remembered(reference)

    def measure(checkpoint: "Checkpoint") -> "Measured":
        return measure_metric(
            fitting[0],
            _predict(checkpoint),
            examples,
            checkpoint.processor,
            task=checkpoint.task,
            batch_size=batch_size,
            max_length=max_length,
            reference=expected,
        )

    return Judge(fitting[0], measure)


def _predict(checkpoint: "Checkpoint") -> "Predict":
    """Return the checkpoint's answers, wherever its weights are at the moment."""

    def predict(batch: "Mapping[str, Tensor]") -> Any:
        weights = itertools.chain(checkpoint.module.parameters(), checkpoint.module.buffers())
        device = next(weights).device
        return checkpoint.predict({name: value.to(device) for name, value in batch.items()})

    return predict


def _remembered(checkpoint: "Checkpoint") -> "Predict":
    from benchmarks.evaluation import Remembered

    return Remembered(_predict(checkpoint))
