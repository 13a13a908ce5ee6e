"""Looking at what layers are given while a model runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from compress.checkpoint import Checkpoint


@contextmanager
def watching(
    checkpoint: Checkpoint, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see` with a layer's name and its input before each call of the layers `names`.

    The names are those of the backbone's modules.
    """

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, args[0] if args else next(iter(kwargs.values())))

    handles = [
        checkpoint.backbone.get_submodule(name).register_forward_pre_hook(
            partial(hook, name), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
