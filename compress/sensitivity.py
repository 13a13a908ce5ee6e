"""What quantizing each layer alone costs: noise at the model's output, relative to the signal.

With y the float model's output and ŷ that of the model with one layer quantized, the cost is
Σ (ŷ − y)² / Σ y² over the numbers that belong to no padding, the inverse of the signal-to-noise
ratio by which Pandey et al. 2023 (arXiv:2302.05397) order layers.

A layer deep in the model changes nothing before it. What the blocks give in the float pass is
therefore kept, and played back for those that end before the layer is first called.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib_data.errors import DataError
from compress.mixture import Mixture
from compress.tokens import Tokens, tokens_of

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What quantizing one layer alone costs."""

    module: str
    parameters: int
    noise: float  # of the output that metrics look at, a share of the signal's power
    outputs: Mapping[str, float]  # the same of every output; infinite where numbers are not finite

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON knows it, which has no infinity: null."""
        told = {name: _told(noise) for name, noise in self.outputs.items()}
        return {
            "module": self.module,
            "parameters": self.parameters,
            "noise": _told(self.noise),
            "outputs": told,
        }


def _told(noise: float) -> float | None:
    return noise if math.isfinite(noise) else None


def sensitivity(
    mixture: Mixture, batches: Iterable[Batch], progress: Callable[[], None] = lambda: None
) -> tuple[Cost, ...]:
    """Return what each layer of the mixture costs on `batches`, the costliest first.

    One float pass, then one per layer, of which what lies before the layer is not computed again.
    `progress` is called `passes` times. Raises `DataError` where there is no batch.
    """
    signal: dict[str, float] = {}
    noise: dict[str, dict[str, float]] = {name: {} for name in mixture.names}
    exact = mixture.with_quantized_(())
    tokens, main = tokens_of(exact), exact.output
    for batch in batches:
        exact = mixture.with_quantized_(())
        with _recorded(exact.backbone, mixture.places) as tape:
            expected = exact.predict(batch)
        progress()
        for output, y in expected.items():
            counted = _counted(tokens, output, y, batch)
            signal[output] = signal.get(output, 0.0) + _power(counted[np.isfinite(counted)])
        for name, sums in noise.items():
            changed = mixture.with_quantized_((name,))
            with tape.played_before(name):
                found = changed.predict(batch)
            for output, y in expected.items():
                pair = (_counted(tokens, output, values, batch) for values in (found[output], y))
                sums[output] = sums.get(output, 0.0) + _difference(*pair)
            progress()
    if not signal:
        raise DataError("there is no batch to measure sensitivity on; give --data at least one row")
    costs = []
    for name, sums in noise.items():
        shares = {output: power / (signal[output] or 1.0) for output, power in sums.items()}
        costs.append(Cost(name, mixture.parameters(name), shares[main], shares))
    return tuple(sorted(costs, key=lambda cost: -cost.noise))  # stable: the model's own order


def passes(mixture: Mixture, batches: Sequence[Any]) -> int:
    """Return how often `sensitivity` calls its `progress`."""
    return len(batches) * (1 + len(mixture.names))


def _counted(tokens: Tokens, output: str, values: np.ndarray, batch: Batch) -> np.ndarray:
    """Return the numbers of an output that belong to no padding."""
    if tokens.mask is not None:
        return tokens.real(output, values, batch)
    # an encoder–decoder: its encoder reads under the mask, its decoder what is labelled
    mask = batch.get("attention_mask")
    if not output.startswith("encoder_"):
        labels = batch.get("labels")
        mask = None if labels is None else labels >= 0
    if mask is None or values.ndim < 3 or values.shape[:2] != tuple(mask.shape):
        return values
    return values[mask.bool().numpy()]


def _power(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _difference(found: np.ndarray, y: np.ndarray) -> float:
    """Return Σ (found − y)² where y is finite; infinity where `found` is not."""
    finite = np.isfinite(y)
    if not np.isfinite(found[finite]).all():
        return math.inf
    return _power(found[finite].astype(np.float64) - y[finite])


# --- what need not be computed again ------------------------------------------------------------


class _Tape:
    """What each call of a block gave, in order, and how many had ended when a layer was first called."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.given: list[tuple[nn.Module, Any]] = []
        self.ended: dict[str, int] = {}

    @contextlib.contextmanager
    def played_before(self, name: str) -> Iterator[None]:
        """Let the calls that ended before the layer `name` was first called give what they gave."""
        upcoming = iter(self.given[: self.ended.get(name, 0)])

        def play(block: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                kept, output = next(upcoming, (None, None))
                # copies: models may write into what a block returns
                return _copied(output) if kept is block else compute(*args, **kwargs)

            return forward

        try:
            for block in self.blocks:
                vars(block)["forward"] = play(block, block.forward)
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)


@contextlib.contextmanager
def _recorded(model: nn.Module, places: Mapping[str, str]) -> Iterator[_Tape]:
    """Yield a tape that is filled by the pass made meanwhile; `places` says where a layer stands."""
    tape = _Tape(_blocks(model))

    def gave(block: nn.Module, _: Any, output: Any) -> None:
        tape.given.append((block, _copied(output)))

    def called(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            tape.ended.setdefault(name, len(tape.given))

        return note

    handles = [block.register_forward_hook(gave) for block in tape.blocks]
    for name, place in places.items():
        handles.append(model.get_submodule(place).register_forward_pre_hook(called(name)))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost lists of modules: a transformer's layers."""
    blocks: list[nn.Module] = []
    if isinstance(model, nn.ModuleList):
        return [*model]
    for child in model.children():
        blocks += _blocks(child)
    return list({id(block): block for block in blocks}.values())


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)
