"""What a training run must remember to go on as if nothing had happened, as tensors and plain values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calib_data.errors import ModelError
from compress.averaging import AveragedWeights, Best
from compress.files import destination_errors
from compress.stepping import Stepper
from compress.workspace import State

_DEEPSPEED = "deepspeed"  # the folder that DeepSpeed fills


def state_of(
    stepper: Stepper, average: AveragedWeights | None, best: Best, partial: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of a run after a step; all processes call it.

    Weights, the optimizer's moments, the average, the best weights, each process's random numbers,
    the loss scale. Where no process holds whole weights, each writes its share into `partial`.
    """
    tensors = _plain_tensors({"random": _gathered_random_state(stepper)})
    if stepper.deepspeed:
        stepper.accelerator.save_state(str(partial / _DEEPSPEED))
    else:
        own = _plain_tensors(
            {"weights": _all_weights(stepper.module), "optimizer": _moments(stepper)}
        )
        if stepper.sharded:
            with destination_errors(partial):
                save_file(own, partial / _shard(stepper))
            stepper.accelerator.wait_for_everyone()
        else:
            tensors |= own
    if average is not None:
        tensors |= _plain_tensors({"average": average.weights})
    tensors |= _plain_tensors({"best": best.weights})
    scaler = stepper.accelerator.scaler
    plain = {
        "best": {"value": best.value, "step": best.step, "stale": best.stale},
        "scale": None if scaler is None else scaler.state_dict(),
    }
    return tensors, plain


def restore_state_(
    state: State, stepper: Stepper, average: AveragedWeights | None, best: Best
) -> None:
    """Put a run back to where `state_of` found it; raises `ModelError` for a state that lacks part."""
    device = stepper.accelerator.device
    try:
        if stepper.deepspeed:
            stepper.accelerator.load_state(str(state.directory / _DEEPSPEED))
        else:
            own = load_file(state.directory / _shard(stepper)) if stepper.sharded else state.tensors
            _copy_(_all_weights(stepper.module), _group(own, "weights"))
            _restore_moments_(stepper, _group(own, "optimizer"))
        if average is not None:
            _copy_(average.weights, _group(state.tensors, "average"))
        best.weights = {n: v.to(device) for n, v in _group(state.tensors, "best").items()}
        noted = state.plain["best"]
        best.value, best.step, best.stale = noted["value"], noted["step"], noted["stale"]
        if stepper.accelerator.scaler is not None:
            stepper.accelerator.scaler.load_state_dict(state.plain["scale"])
        _set_random_state(_group(state.tensors, "random"), stepper.accelerator.process_index)
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
        OSError,
        SafetensorError,
    ) as error:
        raise ModelError(
            f"{state.directory} does not fit the run: {error}; start anew with --overwrite"
        ) from error


def _shard(stepper: Stepper) -> str:
    return f"shard-{stepper.accelerator.process_index:05d}.safetensors"


def _plain_tensors(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return copies on the CPU, named by group; of a shared tensor this process's share."""
    return {
        f"{group}.{name}": _local(value.detach()).cpu().contiguous().clone()
        for group, values in groups.items()
        for name, value in values.items()
    }


def _local(value: Any) -> Tensor:
    own: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return own


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = f"{group}."
    found = {n: v for n, v in tensors.items() if n.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _all_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


@torch.no_grad()
def _copy_(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if set(own) != set(saved):
        raise KeyError(f"its tensors differ in {sorted(set(own) ^ set(saved))[0]}")
    for name, value in saved.items():
        _local(own[name]).copy_(value)


def _moments(stepper: Stepper) -> dict[str, Tensor]:
    """Return the optimizer's tensors by parameter number and name: 17.exp_avg."""
    found = stepper.optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, row in found.items() for name, value in row.items()}


def _restore_moments_(stepper: Stepper, saved: Mapping[str, Tensor]) -> None:
    parameters = [p for group in stepper.optimizer.param_groups for p in group["params"]]
    rows: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.dim() and hasattr(parameter, "to_local"):  # a shared parameter's is shared alike
            whole = torch.zeros_like(parameter.detach())
            _local(whole).copy_(value)
            value = whole
        rows.setdefault(int(number), {})[name] = value
    fresh = stepper.optimizer.state_dict()
    stepper.optimizer.load_state_dict({**fresh, "state": rows})


def _gathered_random_state(stepper: Stepper) -> dict[str, Tensor]:
    """Return the state of torch's generators, which is all that training draws from, (processes, N)."""
    own = {"cpu": torch.get_rng_state()}
    device = stepper.accelerator.device
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    gather = stepper.accelerator.gather
    return {name: gather(value[None].to(device)).cpu() for name, value in own.items()}


def _set_random_state(saved: Mapping[str, Tensor], rank: int) -> None:
    torch.set_rng_state(saved["cpu"][rank].clone())  # it looks past a view
    if "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"][rank].clone())
