"""What the inputs of a model's layers look like, seen in one pass over calibration data.

Nothing that comes in is kept: a layer has a histogram, and sums, of a fixed size. Layers that are
given the same tensor have them in common, so that they agree on its scale.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from calib_data.errors import DataError, ModelError
from compress.calibration_state import Tallies, calibration_state
from compress.checkpoint import Checkpoint
from compress.input_stats import InputStats, Tally
from compress.layer_inputs import watching
from compress.padding import Layouts, input_layouts, masks_of, real_vectors
from compress.processes import on_device
from compress.quantize_config import QuantizeConfig


class CalibrationData(Protocol):
    """Batches of inputs, and a digest of what they hold."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class Calibration:
    """What calibration saw: statistics by the layer's name, shared where layers share an input."""

    inputs: Mapping[str, InputStats]
    fingerprint: str  # of the data
    samples: int
    unseen: tuple[str, ...] = ()  # layers that were given nothing

    def ranges(self, config: QuantizeConfig) -> dict[str, list[float]]:
        """Return [low, high] of each layer's input, as `config` chooses it.

        Raises `DataError`, naming the layer, where there are too few values for that.
        """
        symmetric = config.activations == "int8"
        found = {}
        for name, stats in self.inputs.items():
            try:
                chosen = stats.range(
                    str(config.ranges), config.percentile, 255 if symmetric else 256, symmetric
                )
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
            found[name] = list(chosen)
        return found


def calibrate(
    checkpoint: Checkpoint,
    names: Iterable[str],
    batches: CalibrationData,
    *,
    moments: bool = False,
    progress: Callable[[], None] = lambda: None,
    state: Path | None = None,
) -> Calibration:
    """Return what the layers `names` of the checkpoint's backbone are given on `batches`.

    Positions of padding do not count (see `padding`). With `moments`, the second moments of the inputs
    are there too: (in, in) numbers for each tensor, and as much computing as the layer itself or more.
    Where there is a GPU, it runs there; the module is moved and moved back.

    With `state`, a folder of its own, what was seen is saved there every so often, and a killed run
    goes on from it to the same result, bit for bit; the folder goes in the end.

    Raises `DataError` where there is no batch, `ModelError`, naming the layer, for an input that is
    infinite or not a number, and `ConfigError` for a state of other data or another model.
    """
    names = list(names)
    with (
        calibration_state(state, checkpoint, names, batches.fingerprint, moments) as saved,
        on_device(checkpoint.module) as device,
        torch.no_grad(),
    ):
        layouts = input_layouts(checkpoint, names)
        tallies, samples = saved.tallies, saved.samples
        for step, batch in enumerate(batches):
            if step >= saved.steps:
                moved = {name: value.to(device) for name, value in batch.items()}
                run = _Run(layouts, masks_of(moved), moments, tallies)
                with watching(checkpoint, names, run.see):
                    checkpoint.forward(moved)
                run.fold()
                samples += len(next(iter(batch.values())))
                saved.keep(step + 1, samples, tallies)
            progress()
    if not samples:
        raise DataError("there is no calibration batch; give --data at least one row")
    inputs = _shared(names, tallies, moments)
    unseen = tuple(name for name in names if name not in inputs)
    return Calibration(inputs, batches.fingerprint, samples, unseen)


@dataclass(eq=False)
class _Tensor:
    """A tensor that came into layers in this run."""

    alive: "weakref.ref[Tensor]"
    version: int  # raised when it is written to
    tally: Tally
    layers: list[str] = field(default_factory=list)

    def is_(self, x: Tensor) -> bool:
        return self.alive() is x and self.version == x._version


class _Run:
    """Counts each tensor that comes into a layer once, for all layers that it comes into."""

    def __init__(
        self, layouts: Layouts, masks: Mapping[str, Tensor], moments: bool, tallies: Tallies
    ) -> None:
        self._layouts, self._masks, self._moments = layouts, masks, moments
        self._tallies = tallies
        self._tensors: list[_Tensor] = []
        self._calls: Counter[str] = Counter()

    def see(self, name: str, x: Tensor) -> None:
        """Count the input `x` of the layer `name`."""
        call = self._calls[name]
        self._calls[name] += 1
        known = next((one for one in self._tensors if one.is_(x)), None)
        if known is None:
            self._fold([one for one in self._tensors if one.alive() is None])
            known = _Tensor(weakref.ref(x), x._version, Tally(self._moments))
            vectors = real_vectors(x, self._layouts.get(name, ()), call, self._masks)
            try:
                known.tally.add(vectors)
            except DataError as error:
                raise ModelError(
                    f"the input of {name} is infinite or not a number on the calibration data; "
                    f"check the weights and the data, or leave it in float with --skip {name}"
                ) from error
            self._tensors.append(known)
        if name not in known.layers:
            known.layers.append(name)

    def fold(self) -> None:
        """Put what was counted in this run to that of those before."""
        self._fold(list(self._tensors))

    def _fold(self, tensors: Iterable[_Tensor]) -> None:
        # no layer can be given a tensor any more that is gone; second moments are large
        for one in tensors:
            self._tensors.remove(one)
            if one.tally.count:
                whole = self._tallies.setdefault(tuple(one.layers), Tally(self._moments))
                whole.merge(one.tally)


def _shared(names: Iterable[str], tallies: Tallies, moments: bool) -> dict[str, InputStats]:
    """Return each layer's statistics: of all tensors that came into it, one object for the same ones."""
    made: dict[tuple[tuple[str, ...], ...], InputStats] = {}
    inputs = {}
    for name in names:
        own = tuple(layers for layers in tallies if name in layers)
        if not own:
            continue
        if own not in made:
            whole = Tally(moments)
            for layers in own:
                whole.merge(tallies[layers])
            made[own] = whole.stats()
        inputs[name] = made[own]
    return inputs
