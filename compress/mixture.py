"""A model whose layers are float or quantized, one by one as one likes; each is made once."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from compress.checkpoint import Checkpoint
from compress.patches import Patches, as_convolution, shown_names
from compress.quantize import Prepared, quantize_only
from compress.quantize_config import QuantizeConfig


class Mixture:
    """One working copy of a prepared checkpoint, and both forms of each of its layers.

    In memory it is the float model, which is shared with the input and stays untouched, and a
    quantized one.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: QuantizeConfig,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.names = prepared.names
        self._made = quantize_only(prepared, prepared.names, config, progress)
        source = prepared.checkpoint.backbone
        folded = shown_names(source)  # what stays float is a convolution again
        # where each stands in the working copy, in either form
        self.places = {name: folded.get(name, name) for name in self.names}
        self._small = {n: self._made.backbone.get_submodule(p) for n, p in self.places.items()}
        self._float = {n: source.get_submodule(p) for n, p in self.places.items()}
        for name, module in self._float.items():
            if isinstance(module, Patches):
                self._float[name] = as_convolution(module)

    def with_quantized_(self, names: Collection[str]) -> Checkpoint:
        """Make the layers `names` quantized ones and the others float; return the working copy.

        It changes with the next call.
        """
        for name in self.names:
            chosen = self._small if name in names else self._float
            self._made.backbone.set_submodule(self.places[name], chosen[name])
        return replace(self._made, quantization=self._settings(names))

    def parameters(self, name: str) -> int:
        """Return how many numbers the float layer holds."""
        return sum(value.numel() for value in self._float[name].parameters())

    def _settings(self, names: Collection[str]) -> dict[str, Any] | None:
        if not names:
            return None
        chosen = [name for name in self.names if name in names]
        return {**(self._made.quantization or {}), "modules": chosen}
