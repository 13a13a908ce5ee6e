"""Where a model computes, and the processes that train together: which this is, how they agree."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")


def is_main() -> bool:
    """Return whether this is the process that writes and tells; launchers say so in RANK."""
    return os.environ.get("RANK", "0") == "0"


def on_cpu() -> bool:
    """Return whether training runs on the CPU: there is no GPU, or `accelerate launch --cpu`."""
    import torch

    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.cuda.is_available()


def training_device() -> "torch.device":
    """Return the device that this process trains on, for a teacher to be moved to."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu()).device


@contextmanager
def on_device(module: "nn.Module") -> "Iterator[torch.device]":
    """Yield the device to run `module` on, with the module there until the block ends."""
    import torch

    before = next(module.parameters()).device
    device = before if on_cpu() else torch.device("cuda")
    module.to(device)
    try:
        yield device
    finally:
        module.to(before)


def agreed(action: Callable[[], T]) -> T:
    """Return what `action` gives on the main process, on all processes; the others do not call it.

    Its error ends all of them: the main process raises it, the others leave quietly with the same
    exit code, so that none waits for one that is gone and the user reads one line.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=on_cpu())
    if state.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]  # the result, the exit code
    raised: Exception | None = None
    if state.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            raised, outcome[1] = error, getattr(error, "exit_code", 1)
    broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    if outcome[1] is not None:
        raise SystemExit(outcome[1])
    result: T = outcome[0]
    return result
