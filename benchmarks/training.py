"""Training steps per second: this project's loop against one written by hand, at the same work.

    python -m benchmarks.training

A BERT of MiniLM's size learns a fixed batch in two processes, one with `compress.training`, one with
a plain PyTorch loop: same weights, loss, optimizer, clipping and schedule. They take turns, one round
of steps each, and what is compared are rounds next to each other. Their losses must agree, or the
comparison is void.
"""

import argparse
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np

from benchmarks.config import usable_cores
from benchmarks.report import Environment
from benchmarks.statistics import MINIMUM_ROUNDS, round_ratios, sign_interval
from benchmarks.worker import WorkerError

LOOPS = ("ours", "plain")


@dataclass(frozen=True)
class Work:
    """What both loops do."""

    hidden: int = 384
    layers: int = 6
    batch: int = 16
    sequence: int = 64
    steps: int = 5  # a round
    rounds: int = 8
    precision: str = "no"
    threads: int = 1

    @property
    def total(self) -> int:
        """Steps in all; the first round is warm-up."""
        return self.steps * (self.rounds + 1)


@dataclass(frozen=True)
class Comparison:
    """How the loops did: steps per second, peak memory in bytes, and ours over plain."""

    steps_per_second: dict[str, float]
    peak_bytes: dict[str, int]
    ratio: float
    interval: tuple[float, float]


def compare(work: Work) -> Comparison:
    """Run both loops in turns; raises `WorkerError` where their losses differ or one of them fails."""
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    seconds: dict[str, list[list[float]]] = {name: [] for name in LOOPS}
    try:
        for name in LOOPS:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=_worker, args=(name, work, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        for number in range(work.rounds + 1):
            for name in LOOPS if number % 2 else reversed(LOOPS):
                pipes[name].send("go")
                seconds[name].append(_answer(name, pipes[name]))
        ends = {name: _answer(name, pipes[name]) for name in LOOPS}
    finally:
        for process in processes:
            process.kill()
    ours, plain = (np.array(ends[name]["losses"]) for name in LOOPS)
    if not np.allclose(ours, plain, rtol=1e-3 if work.precision == "no" else 5e-2):
        raise WorkerError(f"the loops do not the same work: losses {ours[-1]} and {plain[-1]}")
    timed = {name: rounds[1:] for name, rounds in seconds.items()}  # the first was warm-up
    ratios = round_ratios(timed["ours"], timed["plain"])
    return Comparison(
        {name: float(1 / np.median(np.concatenate(rounds))) for name, rounds in timed.items()},
        {name: int(end["peak"]) for name, end in ends.items()},
        float(np.median(ratios)),
        sign_interval(ratios),
    )


def _answer(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise WorkerError(f"the process of the loop {name} ended; its reason is above") from error


def _worker(name: str, work: Work, pipe: Connection) -> None:
    """Run one loop, a round at each `go`; then tell its losses and peak memory."""
    import torch

    torch.set_num_threads(work.threads)
    stamps: list[float] = []

    def between() -> None:
        """Count a step; at the end of a round tell its times and wait for the next."""
        now = time.perf_counter()
        stamps.append(now)
        if len(stamps) > work.steps:
            pipe.send(list(np.diff(stamps)))
            stamps.clear()
            begin()

    def begin() -> None:
        if len(losses) < work.total:
            pipe.recv()
            stamps.append(time.perf_counter())

    losses: list[float] = []

    def told(loss: float) -> None:
        losses.append(loss)
        between()

    loops = {"ours": _ours, "plain": _plain}
    model, batch = _model(work), _batch(work)
    loops[name](model, batch, work, told, begin)
    pipe.send({"losses": losses, "peak": _peak()})


def _ours(
    model: Any, batch: Mapping[str, Any], work: Work, told: Callable[[float], None],
    begin: Callable[[], None],
) -> None:  # fmt: skip
    from calib_data.batches import Batches
    from compress.training import TrainConfig, train_

    class Once:
        """The one batch, as often as asked for; the first time the clock starts."""

        fingerprint = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
        batch_size = work.batch

        def __len__(self) -> int:
            return 1

        def iterate(self, epoch: int) -> Iterator[Mapping[str, Any]]:
            if epoch == 0:
                begin()
            yield batch

    def loss_of(batch: Mapping[str, Any], step: Mapping[str, float]) -> dict[str, Any]:
        return {"hard": model(**batch).loss * batch["labels"].shape[0] / step["rows"]}

    config = TrainConfig(steps=work.total, dropout=True, precision=work.precision)
    train_(model, loss_of, cast(Batches, Once()), config, told)


def _plain(
    model: Any, batch: Mapping[str, Any], work: Work, told: Callable[[float], None],
    begin: Callable[[], None],
) -> None:  # fmt: skip
    import torch

    from compress.train_config import TrainConfig, learning_rate

    config = TrainConfig(steps=work.total)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-4, fused=True)
    begin()
    for step in range(work.total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, work.total, config)
        optimizer.zero_grad()
        inputs = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=work.precision == "bf16"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        told(loss.item())


def _model(work: Work) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.models.bert.configuration_bert import BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 32,
        intermediate_size=4 * work.hidden,
        # none: the two loops draw random numbers at different moments
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModelForSequenceClassification.from_config(config)


def _batch(work: Work) -> dict[str, Any]:
    import torch

    random = torch.Generator().manual_seed(0)
    shape = (work.batch, work.sequence)
    return {
        "input_ids": torch.randint(1, 30000, shape, generator=random),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.randint(0, 2, (work.batch,), generator=random),
    }


def _peak() -> int:
    """Return the most memory this process has had, in bytes: on the GPU if it used one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Compare the loops and print a table, or JSON with the conditions."""
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__)
    parser.add_argument("--batch", type=int, default=Work.batch)
    parser.add_argument("--sequence", type=int, default=Work.sequence)
    parser.add_argument("--steps", type=int, default=Work.steps, help="steps a round")
    parser.add_argument("--rounds", type=int, default=Work.rounds)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true", dest="as_json")
    settings = vars(parser.parse_args())
    as_json = settings.pop("as_json")
    if settings["rounds"] < MINIMUM_ROUNDS:
        parser.error(f"--rounds must be at least {MINIMUM_ROUNDS}")
    work = Work(**settings)
    environment = Environment.here("cpu", work.threads)
    try:
        found = compare(work)
    except WorkerError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    if as_json:
        print(json.dumps({**asdict(found), "work": asdict(work), **asdict(environment)}, indent=2))
        return
    print("| loop | steps/s | peak memory, MB |\n|---|---|---|")
    for name in LOOPS:
        print(
            f"| {name} | {found.steps_per_second[name]:.3f} | {found.peak_bytes[name] / 1e6:.0f} |"
        )
    low, high = found.interval
    print(f"\nours ÷ plain: {found.ratio:.3f} ({low:.3f}–{high:.3f}), {work}")


if __name__ == "__main__":
    main()
