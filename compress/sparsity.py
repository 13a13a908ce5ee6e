"""The sparsify stage: single weights become zero, and those that stay make up for them.

The layers keep their shapes and are stored and exported dense; zeros shrink a file that is packed, and
2:4 is what NVIDIA's sparse tensor cores multiply at twice the speed.
"""

import copy
import fnmatch
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib_data.errors import ModelError
from compress.adapters import refuse_adapters
from compress.blocks import all_groups, features, input_columns
from compress.calibration import CalibrationData
from compress.checkpoint import Checkpoint, StageResult, weights_sha256
from compress.config import StageConfig, one_of, require
from compress.moments import Moment, layer_moments
from compress.patterns import check_pattern
from compress.rounding import STRIDE, Settled, settle

METHODS = ("sparsegpt", "wanda", "magnitude")
PATTERNS = ("free", "2:4")
_RIDGE = 0.1  # of each input's moment, added to it: sparse layers before this one change its inputs


@dataclass(frozen=True)
class SparsityConfig(StageConfig):
    """How many weights of the attention and feed-forward blocks become zero, and which."""

    share: float = 0.5  # of each layer's weights; 2:4 is always a half
    pattern: str = "free"  # anywhere, or 2:4: two of every four inputs in a row, for each output
    method: str = "sparsegpt"  # what says which: see `sparsify`
    skip: tuple[str, ...] = ()  # patterns of module names that stay dense

    def __post_init__(self) -> None:
        require(0 < self.share < 1, f"--sparsity must be above 0 and below 1, got {self.share}")
        one_of("--pattern", self.pattern, PATTERNS)
        one_of("--method", self.method, METHODS)
        require(
            self.pattern == "free" or self.share == 0.5,
            f"--pattern {self.pattern} makes a half of the weights zero; leave --sparsity out",
        )


def sparsify(
    checkpoint: Checkpoint,
    batches: CalibrationData,
    config: SparsityConfig,
    progress: Callable[[], None] = lambda: None,
) -> StageResult:
    """Return the checkpoint with zeros among the weights of its blocks' linear layers.

    Each layer loses the same share, the least first: by the weight's magnitude; by |w|·‖x‖ within each
    output (`wanda`: Sun et al. 2023, arXiv:2306.11695); or by what zeroing it costs after those still
    to come have made up for it, which they then do (`sparsegpt`: Frantar and Alistarh 2023,
    arXiv:2301.00774), biases too. ‖x‖ and moments are those of the dense model (see `moments`);
    `magnitude` reads no data.

    The input is untouched. Training keeps the zeros (`hold_zeros`). Raises `ModelError` for a
    checkpoint that is quantized or has no such layers, and for inputs that 2:4 does not divide.
    """
    if checkpoint.quantization:
        raise ModelError(
            "this checkpoint is quantized already; make it sparse first, then quantize"
        )
    refuse_adapters(checkpoint, "sparsify")
    sparse = replace(checkpoint, module=copy.deepcopy(checkpoint.module))
    names = _chosen(checkpoint, config)
    seen: Mapping[str, Moment] = {}
    if config.method != "magnitude":
        seen = layer_moments(checkpoint, names, batches, progress)
    shares = {}
    for name in names:
        module: Any = sparse.backbone.get_submodule(name)
        _sparsify_(module, seen.get(name), config)
        shares[name] = _zeros(module.weight) / module.weight.numel()
    report = {"zeros": zero_share(sparse), "layers": shares}
    return StageResult(
        sparse.with_stage(
            "sparsify",
            settings=config.to_json(),
            parent=weights_sha256(checkpoint.backbone),
            data=batches.fingerprint,
            metrics={"zeros": report["zeros"], "modules": names},
        ),
        report,
    )


def zero_share(checkpoint: Checkpoint) -> float:
    """Return the share of the blocks' linear weights that are zero."""
    modules: list[Any] = [checkpoint.backbone.get_submodule(n) for n in _layers(checkpoint)]
    total = sum(module.weight.numel() for module in modules)
    return sum(_zeros(module.weight) for module in modules) / max(total, 1)


@contextmanager
def hold_zeros(checkpoint: Checkpoint) -> Iterator[None]:
    """Keep the zeros of a sparse checkpoint while its weights are trained within the block.

    Their gradients are zero then, and what an optimizer makes of that, with weight decay and averages
    too, is zero. Nothing is done where `checkpoint` is not sparse.
    """
    handles = []
    if checkpoint.sparse:
        for name in _layers(checkpoint):
            weight: Any = checkpoint.backbone.get_submodule(name).weight
            if weight.requires_grad and 0 < _zeros(weight) < weight.numel():
                handles.append(weight.register_hook(_masked(weight.detach() != 0)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masked(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * kept.to(gradient.device)


# --- layers -------------------------------------------------------------------------------------


def _layers(checkpoint: Checkpoint) -> list[str]:
    """Return the linear layers of the attention and feed-forward blocks, whose weights are many."""
    parts = itertools.chain.from_iterable(g.parts for g in all_groups(checkpoint.backbone))
    return list(dict.fromkeys(part.module for part in parts))


def _chosen(checkpoint: Checkpoint, config: SparsityConfig) -> list[str]:
    every = _layers(checkpoint)
    for pattern in config.skip:
        check_pattern("--skip", pattern, every)
    names = [n for n in every if not any(fnmatch.fnmatch(n, pattern) for pattern in config.skip)]
    if not names:
        raise ModelError(
            "there is no attention or feed-forward layer to make sparse; skip fewer, or add what the "
            "model calls them to compress/blocks.py"
        )
    if config.pattern == "2:4":
        for name in names:
            width = features(checkpoint.backbone.get_submodule(name))[0]
            if width % 4:
                raise ModelError(
                    f"{name} has {width} inputs, which 2:4 does not divide; pass --skip {name}, or "
                    "prune to a multiple of 4"
                )
    return names


def _zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


# --- one layer ----------------------------------------------------------------------------------


def _sparsify_(module: Any, moment: Moment | None, config: SparsityConfig) -> None:
    """Zero weights of one linear layer; where there is a moment, the others make up for it."""
    weight = input_columns(module, module.weight.detach()).t().float()  # (in, out)
    bias = None if module.bias is None else module.bias.detach().float()
    if config.method == "sparsegpt" and moment is not None and moment.count:
        weight, bias = _settled(weight, bias, moment.gram, config)
    else:
        sizes = weight.abs()
        if config.method == "wanda" and moment is not None and moment.count:
            sizes = sizes * moment.gram.diagonal()[: len(weight)].sqrt().to(weight).unsqueeze(1)
        weight = weight * _kept(sizes, config, per_output=config.method == "wanda")
    with torch.no_grad():
        module.weight.copy_(input_columns(module, weight.t()))
        if bias is not None:
            module.bias.copy_(bias)


def _settled(
    weight: Tensor, bias: Tensor | None, gram: Tensor, config: SparsityConfig
) -> tuple[Tensor, Tensor | None]:
    """Return weight (in, out) and bias with zeros made up for, as `gram` (in [+ 1], …) allows."""
    width = len(weight)
    gram = gram.to(weight.device).clone()
    gram.diagonal().mul_(1 + _RIDGE)
    # fours stay together; the heaviest first, as the others still make up for them
    step = 4 if config.pattern == "2:4" else 1
    loads = gram.diagonal()[:width].reshape(-1, step).sum(dim=1)
    firsts = loads.argsort(descending=True) * step
    order = (firsts.unsqueeze(1) + torch.arange(step, device=firsts.device)).flatten()
    if bias is not None:  # never zeroed, so it makes up for all
        weight = torch.cat([weight, bias.unsqueeze(0)])
        order = torch.cat([order, order.new_tensor([width])])

    def begin(places: Tensor, wanted: Tensor, sizes: Tensor) -> Settled:
        costs = wanted.abs() * sizes.unsqueeze(1)
        own = places != width
        kept = torch.ones_like(costs, dtype=torch.bool)
        if bool(own.any()):
            kept[own] = _kept(costs[own], config, per_output=False)
        by_place = dict(zip(places.tolist(), kept))
        return lambda place, row: row * by_place[place]

    # which of four go is asked anew for each four, when all before them are settled
    found = settle(weight, gram, order, begin, stride=4 if step == 4 else STRIDE)
    return found[:width], None if bias is None else found[width]


def _kept(sizes: Tensor, config: SparsityConfig, per_output: bool) -> Tensor:
    """Return which of the weights (in, out) stay: the largest of `sizes`."""
    if config.pattern == "2:4":
        fours = sizes.reshape(-1, 4, sizes.shape[1])
        largest = fours.topk(2, dim=1).indices
        return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, largest, True).flatten(0, 1)
    compared = sizes if per_output else sizes.reshape(-1, 1)
    count = round(len(compared) * config.share)
    least = compared.argsort(dim=0, stable=True)[:count]
    kept = torch.ones_like(compared, dtype=torch.bool).scatter_(0, least, False)
    return kept.reshape(sizes.shape)
