"""One optimizer step over several batches and processes, on whatever Accelerate runs on."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import TrainingError
from compress.config import require
from compress.cpu_attention import CpuAttention
from compress.embedding_gradients import EmbeddingGradients
from compress.processes import on_cpu
from compress.recompute import recompute_layers_, recomputed_layers
from compress.train_config import TrainConfig, parameter_groups

Batch = Mapping[str, Tensor]
# One batch, and the units of the whole step it belongs to, in; the named terms of the loss out.
LossOf = Callable[[Batch, Mapping[str, float]], dict[str, Tensor]]


def units(batch: Batch) -> dict[str, float]:
    """Return what the terms of a loss are means over, counted in one batch.

    `rows`; `tokens` that are not padding; `next`, the tokens that follow another; `labels` that are
    not −100. A term is its sum divided by the *step's* units, so that a step of several batches, or
    of several processes, has the gradient of one large batch.
    """
    first = next(iter(batch.values()))
    found = {"rows": float(first.shape[0]), "tokens": float(first.shape[0])}
    if "attention_mask" in batch:
        found["tokens"] = float(batch["attention_mask"].sum())
    elif "input_ids" in batch:
        found["tokens"] = float(batch["input_ids"].numel())
    found["next"] = found["tokens"] - found["rows"]
    if "labels" in batch:
        found["labels"] = float((batch["labels"] != -100).sum())
    return found


@dataclass(frozen=True)
class Outcome:
    """What a step came to: the terms of each of its batches, and the gradient's norm.

    Where one of these is not finite, no weight was changed.
    """

    terms: tuple[Mapping[str, float], ...]
    norm: float
    sound: bool  # all terms, and the norm unless fp16 scaling makes up for it, are finite

    @property
    def loss(self) -> float:
        """The step's loss."""
        return sum(sum(part.values()) for part in self.terms)

    def total(self) -> dict[str, float]:
        """Return the step's value of each term."""
        whole: Counter[str] = Counter()
        for part in self.terms:
            whole.update(part)
        return dict(whole)

    def unsound_parts(self) -> list[int]:
        """Return the places of the batches to blame: those whose terms are not finite, or all."""
        bad = [i for i, part in enumerate(self.terms) if not _finite(sum(part.values()))]
        return bad or list(range(len(self.terms)))


class Stepper:
    """A module and its optimizer, prepared by Accelerate, which takes steps on a loss.

    Every process gets the same batches and computes on every so-many-th row of each; losses and
    gradients are sums over all. One that has no row, in a batch with fewer rows than processes,
    computes on the first and counts it as nothing. A loss within the batch, of similarities say,
    sees the rows of one process only.
    """

    def __init__(self, module: nn.Module, loss_of: LossOf, config: TrainConfig, rows: int) -> None:
        """Prepare `module`; `rows` are those of a usual batch, which DeepSpeed wants to know."""
        self.module, self.config = module, config
        groups = parameter_groups(module, config)
        if config.gradient_checkpointing:
            recompute_layers_(module, config.dropout)
        self.accelerator = _accelerator(config, rows)
        kind = str(self.accelerator.distributed_type).rpartition(".")[2]
        self.sharded = kind in ("FSDP", "DEEPSPEED")
        self.deepspeed = kind == "DEEPSPEED"  # which keeps weights and moments to itself
        require(
            not (self.sharded and config.ema),
            f"--ema needs whole weights in each process, {kind} shards them; leave it out",
        )
        self._pristine = copy.deepcopy(module).cpu() if self.sharded else None
        # Fused, which FSDP's and DeepSpeed's own weights and gradient scaling do without.
        fused = not self.sharded and config.precision != "fp16"
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
        self.model, self.optimizer = self.accelerator.prepare(_Loss(module, loss_of), optimizer)
        # Processes share dense gradients alone.
        alone = self.processes == 1 and self.accelerator.device.type == "cpu"
        self._tables = EmbeddingGradients(module if alone else None)
        self.to_training_mode_()

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return int(self.accelerator.num_processes)

    def to_training_mode_(self) -> None:
        """Put the module into the mode in which it is trained: dropout as asked for."""
        self.module.train(self.config.dropout)
        if self.config.gradient_checkpointing:
            for layer in recomputed_layers(self.module):
                layer.training = True  # without it the layer keeps its activations

    def step(self, parts: Sequence[Batch], rate: float) -> Outcome:
        """Take one step on the sum of the loss over `parts`; leave the weights if it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        counted: Counter[str] = Counter()
        for part in parts:
            counted.update(units(part))
        names: tuple[str, ...] = ()
        rows = []
        with self._tables.kept(), CpuAttention():
            for part in parts:
                batch, share = self._own_rows(part)
                with self.accelerator.accumulate(self.model):
                    terms = self.model(batch, counted)
                    names = tuple(terms)
                    values = share * torch.stack([value.float() for value in terms.values()])
                    # Accelerate divides by the batches of a step, and takes the mean over processes.
                    self.accelerator.backward(values.sum() * len(parts) * self.processes)
                rows.append(values.detach())
        table = torch.stack(rows)  # (parts, terms)
        if self.processes > 1:
            table = self.accelerator.reduce(table, "sum")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        figures = [float(x) for x in table.flatten().tolist()]  # waits for the device
        if hasattr(norm, "full_tensor"):  # FSDP's, of which each process holds a share
            norm = norm.full_tensor()
        norm = float("nan") if norm is None else float(norm)
        scaled = self.accelerator.scaler is not None
        sound = all(map(_finite, figures)) and (self.sharded or scaled or _finite(norm))
        if sound:
            self.optimizer.step()
        width = len(names)
        split = [figures[i : i + width] for i in range(0, len(figures), width)]
        return Outcome(tuple(dict(zip(names, row)) for row in split), norm, sound)

    def _own_rows(self, part: Batch) -> tuple[dict[str, Tensor], float]:
        """Return this process's rows of a batch on its device, and what they count."""
        rank, share = self.accelerator.process_index, 1.0
        own = dict(part)
        if self.processes > 1:
            if rank >= next(iter(part.values())).shape[0]:
                rank, share = 0, 0.0
                own = {name: value[:1] for name, value in part.items()}
            else:
                own = {name: value[rank :: self.processes] for name, value in part.items()}
        device = self.accelerator.device
        return {name: value.to(device, non_blocking=True) for name, value in own.items()}, share

    def close(self) -> None:
        """Leave the module as any other: whole, in eval mode, without gradients or wrappers."""
        if self.config.gradient_checkpointing:
            for layer in recomputed_layers(self.module):
                layer.gradient_checkpointing = False
        if self._pristine is not None:
            self._gather_(self._pristine)
        for parameter in self.module.parameters():
            parameter.grad = None
        self.accelerator.free_memory()
        self.module.eval()

    def _gather_(self, pristine: nn.Module) -> None:
        """Give the module its whole weights again; off the main process those of the start."""
        whole = self.accelerator.get_state_dict(self.model)
        if whole:
            pristine.load_state_dict({k.removeprefix("module."): v for k, v in whole.items()})
        # Sharding replaced the module's insides; others hold the module itself, so it stays.
        self.module.__class__ = pristine.__class__
        self.module.__dict__ = pristine.__dict__


class _Loss(nn.Module):
    """What Accelerate wraps: the trained module and its loss as one forward pass."""

    def __init__(self, module: nn.Module, loss_of: LossOf) -> None:
        super().__init__()
        self.module = module
        # Behind a function: a loss that is a module has no weights to train.
        self._loss_of = lambda batch, counted: loss_of(batch, counted)

    def forward(self, batch: Batch, counted: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the loss's terms."""
        terms: dict[str, Tensor] = self._loss_of(batch, counted)
        return terms


def _accelerator(config: TrainConfig, rows: int) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        set_seed,
    )

    require(
        not (config.precision == "fp16" and on_cpu()),
        "--precision fp16 needs a GPU; use bf16 or no on the CPU",
    )
    # Both are kept by the process, and an earlier stage may have had another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=config.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulate, sync_with_dataloader=False
        ),
        # Many models have weights that a loss does not reach: BERT's pooler.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        share = max(1, rows // accelerator.num_processes)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share
        plugin.deepspeed_config["gradient_clipping"] = config.clip
    set_seed(config.seed, device_specific=True)
    return accelerator


_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED")


@contextmanager
def memory_errors(batch_size: int, accumulate: int) -> Iterator[None]:
    """Turn what PyTorch says when memory runs out, in its many ways, into a `TrainingError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(x in str(error) for x in _NO_MEMORY):
            raise
        raise TrainingError(
            f"a batch does not fit in memory; lower --batch-size (now {batch_size}) and raise "
            f"--accumulate (now {accumulate}), or add --gradient-checkpointing"
        ) from error


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
