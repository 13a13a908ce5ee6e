"""What variants are timed on: inputs of fixed shapes, real texts as they come, prompts to go on from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from benchmarks.config import BenchmarkConfig
from benchmarks.runtimes import NEW, Source
from calib_data.errors import ConfigError

_TEXTS = 64  # that a pass over real texts has at least
_BATCHES = 16  # and batches


@dataclass(frozen=True)
class Workload:
    """One line of every variant's times: the inputs of the calls that make a pass."""

    label: str
    calls: tuple[Mapping[str, Any], ...]
    batch: int
    sequence: int | None  # tokens of each example; None where there are none, or they differ
    tokens: float | None  # of a call, without padding, on average; None where there are none
    kind: Literal["shape", "traffic", "decoding"] = "shape"
    threads: int = 1

    @property
    def ragged(self) -> bool:
        """Whether its calls differ in length, so that their mean tells what a call takes."""
        return self.kind == "traffic"


def make_workloads(source: Source, config: BenchmarkConfig) -> list[Workload]:
    """Return the inputs of every shape, of real texts if there are some, and of every prompt.

    Raises `ConfigError` for what the model behind `source` cannot do.
    """
    return [*_shapes(source, config), *_traffic(source, config), *_prompts(source, config)]


def _shapes(source: Source, config: BenchmarkConfig) -> list[Workload]:
    signature = source.signature
    has_sequence = getattr(signature, "has_sequence", True)
    found: dict[str, Workload] = {}
    for batch, sequence in config.shapes:
        label = f"{batch} × {sequence}" if has_sequence else _many(batch, "image")
        if label not in found:  # shapes that differ in the sequence alone
            inputs = signature.sample(batch=batch, sequence=sequence, seed=config.seed)
            length = sequence if has_sequence else None
            tokens = None if length is None else float(batch * length)
            found[label] = Workload(label, (inputs,), batch, length, tokens)
    return list(found.values())


def _traffic(source: Source, config: BenchmarkConfig) -> list[Workload]:
    """Return a workload for each batch size: texts in the data's own order, as long as they are."""
    if config.traffic is None:
        return []
    from calib_data.batches import Batches, model_inputs
    from calib_data.sources import open_data

    if source.processor is None or not getattr(source.signature, "has_sequence", True):
        raise ConfigError("--traffic is of texts, and the model takes none; leave it out")
    found = []
    for batch in dict.fromkeys(batch for batch, _ in config.shapes):
        count = max(_TEXTS, _BATCHES * batch)
        examples = open_data(config.traffic, config.traffic_columns, count, config.seed)
        calls, tokens = [], 0
        for start in range(0, len(examples) - batch + 1, batch):
            rows = range(start, start + batch)
            some = examples.rows(rows)
            (made,) = Batches(
                some,
                source.processor,
                batch_size=batch,
                max_length=source.max_length,
                field="both" if source.task.endswith("-classification") else "text",
            )
            calls.append({name: np.asarray(value) for name, value in model_inputs(made).items()})
            tokens += int(made["attention_mask"].sum())
        if not calls:
            raise ConfigError(
                f"--traffic {config.traffic} has {len(examples)} texts, less than a batch of {batch}"
            )
        label = _many(batch, "text")
        found.append(Workload(label, tuple(calls), batch, None, tokens / len(calls), "traffic"))
    return found


def _prompts(source: Source, config: BenchmarkConfig) -> list[Workload]:
    """Return two workloads for each length of prompt: its first new token, and all of them."""
    if not config.prompts:
        return []
    if source.task != "text-generation":
        raise ConfigError(f"--prompts is for text-generation, and the model does {source.task}")
    found = []
    longest = max(config.prompts) + config.new_tokens
    if source.max_length is not None and longest > source.max_length:
        raise ConfigError(
            f"--prompts and --new-tokens make {longest} tokens; the model takes {source.max_length}"
        )
    for length in config.prompts:
        inputs = source.signature.sample(batch=1, sequence=length, seed=config.seed)
        for new in (1, config.new_tokens):
            label = f"{length} + {new} tokens" if new > 1 else f"{length}, first token"
            call = {"input_ids": inputs["input_ids"], NEW: np.array(new)}
            tokens = float(new) if new > 1 else None  # the time to the first is no rate
            found.append(Workload(label, (call,), 1, length, tokens, "decoding"))
    return found


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count > 1)}"


def on_threads(workloads: Sequence[Workload], threads: int, counts: int) -> list[Workload]:
    """Return workloads as they are timed on so many threads, one of `counts` numbers of them."""
    some = f", {_many(threads, 'thread')}" if counts > 1 else ""
    return [replace(w, label=f"{w.label}{some}", threads=threads) for w in workloads]


def largest(workloads: Sequence[Workload]) -> Workload:
    """Return the one that a report is about: of the shapes that with most tokens."""
    return max(_shaped(workloads), key=_tokens)


def smallest(workloads: Sequence[Workload]) -> Workload:
    """Return what one request is made of: of the shapes that with fewest tokens."""
    return min(_shaped(workloads), key=_tokens)


def _shaped(workloads: Sequence[Workload]) -> list[Workload]:
    return [workload for workload in workloads if workload.kind == "shape"]


def _tokens(workload: Workload) -> int:
    return workload.batch * (workload.sequence or 1)
