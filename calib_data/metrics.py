"""Quality of a model, measured on labelled data or against a reference model.

Models are given as `Predict`, so that PyTorch and ONNX are measured by the same code.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import logsumexp
from scipy.stats import spearmanr

from calib_data.batches import Batches, Predict, collect, model_inputs, pick, restore_order
from calib_data.errors import DataError
from calib_data.objectives import Windows
from calib_data.sources import Examples

RANKED = 1500  # examples whose similarities are ranked at once: their number grows as the square
BLOCK = 1000  # examples at a time where there are more


@dataclass(frozen=True)
class Measured:
    """The value of a metric, and what it is the summary of."""

    name: str
    value: float
    # In the order of the examples; NaN where an example has nothing to measure.
    per_example: np.ndarray | None = field(default=None, compare=False, repr=False)
    higher_is_better: bool = True


def spearman(
    predict: Predict,
    first: Batches,
    second: Batches,
    scores: np.ndarray,
    output: str = "sentence_embedding",
) -> Measured:
    """Return 100 × the rank correlation of the cosine of two sentences and their score, −100..100.

    `first` and `second` encode one side each, `scores` is (N,). Per example: the cosine.
    """
    one = _matrix(predict, first, output)
    two = _matrix(predict, second, output)
    return _correlation(_cosine(one, two), np.asarray(scores), first)


def spearman_of_logits(predict: Predict, batches: Batches) -> Measured:
    """Return 100 × the rank correlation of a single logit and the score, −100..100.

    Per example: the logit.
    """
    logits = _matrix(predict, batches, "logits")
    if logits.shape[1] != 1:
        raise DataError(
            f"spearman needs one logit, the model has {logits.shape[1]}; use data with labels"
        )
    return _correlation(logits[:, 0], np.array(batches.examples.column("score")), batches)


def _correlation(predicted: np.ndarray, scores: np.ndarray, batches: Batches) -> Measured:
    if len(scores) < 2 or np.ptp(scores) == 0:
        raise DataError(f"{batches.examples.spec} needs two different scores to rank; add examples")
    # A model that says the same of everything ranks nothing; scipy would warn and say NaN.
    value = 0.0 if np.ptp(predicted) == 0 else float(spearmanr(predicted, scores).statistic)
    return Measured("spearman", 100 * value, predicted)


def accuracy(predict: Predict, batches: Batches) -> Measured:
    """Return the percentage of examples whose highest logit is the label's. Per example: 0 or 1."""
    labels = np.array(batches.examples.column("label"))
    right = (_matrix(predict, batches, "logits").argmax(axis=1) == labels).astype(np.float64)
    return Measured("accuracy", 100 * float(right.mean()), right)


def perplexity(predict: Predict, batches: Batches) -> Measured:
    """Return exp of the mean negative log-likelihood of the next token, every token alike, ≥ 1.

    `logits` are (B, T, V). Per row: its own mean negative log-likelihood, in nats; NaN for a row of a
    single token, after which nothing is predicted.
    """
    means, total, tokens = [], 0.0, 0
    for batch in batches:
        logits = pick(predict(model_inputs(batch)), "logits")
        ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
        for row, (row_ids, row_mask) in zip(logits, zip(ids, mask)):
            # One text at a time: a whole batch of V float64 logits would be gigabytes.
            text, targets = row[row_mask == 1][:-1].astype(np.float64), row_ids[row_mask == 1][1:]
            loss = logsumexp(text, axis=-1) - text[np.arange(len(targets)), targets]
            means.append(loss.mean() if len(loss) else np.nan)
            total, tokens = total + float(loss.sum()), tokens + len(loss)
    if not tokens:
        raise DataError(f"{batches.examples.spec} has no text of two tokens; use longer texts")
    with np.errstate(over="ignore"):  # beyond float64 it is infinite, which is the honest answer
        value = float(np.exp(total / tokens))
    return Measured("perplexity", value, restore_order([np.array(means)], batches), False)


def cosine_fidelity(
    predict: Predict, reference: Predict, batches: Batches, output: str
) -> Measured:
    """Return the mean cosine of the model's output and the reference's, −1..1.

    Per example: the cosine, for outputs (B, T, D) the mean over the tokens that are not padding.
    """
    values = []
    for ours, theirs, weight in _both(predict, reference, batches, output):
        cosine = _cosine(ours, theirs).reshape(weight.shape)
        values.append((cosine * weight).sum(axis=1) / weight.sum(axis=1))
    per_example = restore_order(values, batches)
    return Measured("cosine_fidelity", float(per_example.mean()), per_example)


def agreement(
    predict: Predict, reference: Predict, batches: Batches, output: str = "logits"
) -> Measured:
    """Return the percentage of decisions, the highest logit, that model and reference share.

    Logits (B, T, V) hold a decision for each token that is not padding. Per example: the share.
    """
    shares, equal, decisions = [], 0.0, 0.0
    for ours, theirs, weight in _both(predict, reference, batches, output):
        same = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).reshape(weight.shape) * weight
        shares.append(same.sum(axis=1) / weight.sum(axis=1))
        equal, decisions = equal + same.sum(), decisions + weight.sum()
    return Measured("agreement", 100 * float(equal / decisions), restore_order(shares, batches))


def rank_fidelity(predict: Predict, reference: Predict, batches: Batches, output: str) -> Measured:
    """Return how far the model ranks the similarity of examples as the reference does, −1..1.

    It is the Spearman correlation between the upper triangles of the two cosine matrices; past
    1,500 examples the mean of it over blocks of up to 1,000, which `per_example` then holds.
    """
    ours, theirs = _matrix(predict, batches, output), _matrix(reference, batches, output)
    count = len(ours)
    if count < 3:
        raise DataError(f"rank_fidelity needs 3 examples, {batches.examples.spec} has {count}")
    blocks = np.array_split(np.arange(count), 1 if count <= RANKED else -(-count // BLOCK))
    values = np.array([_rank_correlation(ours[rows], theirs[rows]) for rows in blocks])
    return Measured("rank_fidelity", float(values.mean()), values if len(values) > 1 else None)


def _rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    upper = np.triu_indices(len(ours), k=1)
    first, second = (_unit(x) @ _unit(x).T for x in (ours, theirs))  # (N, N)
    first, second = first[upper], second[upper]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float(np.ptp(first) == np.ptp(second))  # one ranks nothing: alike only if both do
    return float(spearmanr(first, second).statistic)


def _both(
    predict: Predict, reference: Predict, batches: Batches, output: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield both models' outputs of each batch, and what each vector in them counts.

    Outputs (B, D) hold one vector an example, (B, T, D) one a token: padding counts 0. The weights
    are (B, 1) or (B, T).
    """
    for batch in batches:
        inputs = model_inputs(batch)
        ours, theirs = pick(predict(inputs), output), pick(reference(inputs), output)
        if ours.shape != theirs.shape:
            raise DataError(
                f"{output} is {ours.shape} and the reference's {theirs.shape}; "
                "compare models of one kind"
            )
        weight = np.ones(ours.shape[:-1]).reshape(len(ours), -1)
        mask = batch.get("attention_mask")
        if mask is not None and tuple(mask.shape) == ours.shape[:-1]:
            weight = mask.numpy().astype(np.float64)
        yield ours, theirs, weight


def _matrix(predict: Predict, batches: Batches, output: str) -> np.ndarray:
    """Return an output (N, D) in the order of the examples."""
    values = collect(predict, batches, output)
    if values.ndim != 2:
        raise DataError(
            f"the output {output} must have 2 axes, it has {values.ndim}; choose another"
        )
    return values


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (_unit(first) * _unit(second)).sum(axis=-1)


# --- choosing among them -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a metric is measured on."""

    predict: Predict
    examples: Examples
    processor: Any
    task: str
    batch_size: int
    max_length: int | None
    reference: Predict | None

    def batches(self, side: str | None = None) -> Batches:
        """Return the batches of a text column, by default of what the task reads."""
        # Only classifiers read pairs jointly; all else takes texts one by one.
        usual = "both" if self.task.endswith("-classification") else "text"
        return Batches(
            self.examples,
            self.processor,
            batch_size=self.batch_size,
            max_length=self.max_length,
            field=side or usual,
            # a language model is asked about all of a text, in windows of that length
            objective=Windows() if self.task == "text-generation" else None,
        )

    def spearman(self) -> Measured:
        """Compare the scores with the two sides' embeddings, or with the one logit for both."""
        if self.task != "sentence-embedding":
            return spearman_of_logits(self.predict, self.batches())
        scores = np.array(self.examples.column("score"))
        return spearman(self.predict, self.batches("text"), self.batches("text_pair"), scores)

    def compare(self, metric: Callable[[Predict, Predict, Batches, str], Measured]) -> Measured:
        """Compare the task's main output with the reference's."""
        assert self.reference is not None  # `measure_metric` has seen to it
        return metric(self.predict, self.reference, self.batches(), main_output(self.task))


@dataclass(frozen=True)
class Metric:
    """How a metric is measured, and what it takes."""

    measure: Callable[[Case], Measured]
    unit: str = ""
    roles: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()  # none: any
    output: str = ""  # what the main output of the task must be; empty: anything
    reference: bool = False

    @property
    def scale(self) -> float:
        """What a perfect model is given."""
        return 100.0 if self.unit else 1.0

    def suits(self, task: str) -> bool:
        """Return whether the metric makes sense for a task."""
        return task in (self.tasks or (task,)) and self.output in ("", main_output(task))


METRICS = {
    "spearman": Metric(
        Case.spearman, "× 100", ("score",), ("sentence-embedding", "text-classification")
    ),
    "accuracy": Metric(
        lambda case: accuracy(case.predict, case.batches()),
        "%",
        ("label",),
        ("text-classification", "image-classification"),
    ),
    "perplexity": Metric(
        lambda case: perplexity(case.predict, case.batches()), "", ("text",), ("text-generation",)
    ),
    "cosine_fidelity": Metric(lambda case: case.compare(cosine_fidelity), reference=True),
    "rank_fidelity": Metric(
        lambda case: case.compare(rank_fidelity), output="sentence_embedding", reference=True
    ),
    "agreement": Metric(lambda case: case.compare(agreement), "%", output="logits", reference=True),
}


def drop(before: Measured, after: Measured) -> float:
    """Return how much worse `after` is than `before`, as a share; below 0 where it is better.

    Where more is better it is a share of the metric's scale: 0.005 are 0.5 of 100 points, or 0.005 of a
    cosine. Perplexity has no scale: there 0.005 is half a percent more, a loss 0.005 nats higher.
    """
    if before.higher_is_better:
        return (before.value - after.value) / METRICS[before.name].scale
    return after.value / before.value - 1


def main_output(task: str) -> str:
    """Return the name of the output that a task is about."""
    named = {"sentence-embedding": "sentence_embedding", "feature-extraction": "last_hidden_state"}
    return named.get(task, "logits")


def default_metrics(task: str, roles: Collection[str], has_reference: bool) -> tuple[str, ...]:
    """Return the names of the metrics that fit the task, the data and what there is to compare."""
    fitting = [name for name in METRICS if not _lacking(name, task, roles, has_reference)]
    if "accuracy" in fitting and "spearman" in fitting:
        fitting.remove("spearman")  # a classifier with classes has no single logit to rank by
    return tuple(fitting)


def _lacking(name: str, task: str, roles: Collection[str], has_reference: bool) -> str:
    """Return what keeps a metric from being measured; nothing does if it is empty."""
    metric = METRICS[name]
    if not metric.suits(task):
        fitting = [other for other, metric in METRICS.items() if metric.suits(task)]
        return f"is not for {task}; choose among {', '.join(fitting)}"
    needed = set(metric.roles)
    if name == "spearman" and task == "sentence-embedding":
        needed |= {"text", "text_pair"}
    if missing := sorted(needed - set(roles)):
        return f"needs data with {', '.join(missing)}; use other data, or name it with --columns"
    if metric.reference and not has_reference:
        return "needs a reference model; name one, or choose another metric"
    return ""


def measure_metric(
    name: str,
    predict: Predict,
    examples: Examples,
    processor: Any,
    *,
    task: str,
    batch_size: int = 32,
    max_length: int | None = 128,
    reference: Predict | None = None,
) -> Measured:
    """Return a metric of `METRICS`, measured on the examples.

    Raises DataError, naming what is missing, where it does not fit the task or the data.
    """
    if name not in METRICS:
        raise DataError(f"there is no metric {name}; choose among {', '.join(METRICS)}")
    if lacking := _lacking(name, task, examples.roles, reference is not None):
        raise DataError(f"{name} {lacking}")
    case = Case(predict, examples, processor, task, batch_size, max_length, reference)
    return METRICS[name].measure(case)
