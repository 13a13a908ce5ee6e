"""Runtimes for tests: workers import them by name, as in `tests.benchmarks.fakes:steady`.

The model's string holds the settings: `sleep=0.002,factor=2`.
"""

import os
import signal
import time
from collections.abc import Callable

import numpy as np

from benchmarks.runtimes import Arrays, Loaded, Place, Runtime, Source
from calib_data.errors import ProviderError


class FakeSignature:
    has_sequence = True

    def sample(self, batch: int = 2, sequence: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {"input_ids": random.integers(1, 9, (batch, sequence))}


def describe(model: str) -> Source:
    lineage = ({"stage": "source", "model": model},)
    return Source("feature-extraction", FakeSignature(), None, 8, lineage, 1000, {"weights": "ab"})


def settings_of(model: str) -> dict[str, float]:
    pairs = (part.partition("=")[::2] for part in model.split(",") if "=" in part)
    return {name: float(value) for name, value in pairs}


def opener(model: str, place: Place) -> Loaded:
    settings = settings_of(model)
    random = np.random.default_rng(0)

    def run(batch: Arrays) -> Arrays:
        noise = 1 + settings.get("noise", 0) * random.random()  # a share of the sleep
        time.sleep(settings.get("sleep", 0.001) * noise)
        ids = np.asarray(batch["input_ids"], dtype=np.float32)
        if ids.shape[1] > settings.get("longest", 1000):
            raise ValueError(f"longer than {settings['longest']:g}")
        return {"output": np.stack([ids.sum(1), ids[:, 0]], axis=1) * settings.get("factor", 1)}

    return Loaded(lambda batch: batch, run, lambda outputs: outputs, (f"fake:{place.threads}",))


def _busy(model: str, place: Place) -> Loaded:
    """Return a model that computes, `work` matrix products a call."""
    matrix = np.random.default_rng(0).random((64, 64), np.float32)

    def run(batch: Arrays) -> Arrays:
        product = matrix
        for _ in range(int(settings_of(model)["work"])):
            product = (product @ matrix) / 64
        return {"output": product[:1, :2]}

    return Loaded(dict, run, lambda outputs: outputs, ("fake",))


def broken(run: Callable[[Arrays], Arrays]) -> Runtime:
    return Runtime(describe, lambda *_: Loaded(dict, run, dict, ("fake",)))


def _raise(_: Arrays) -> Arrays:
    raise RuntimeError("the weights\nare bad")


def _die(_: Arrays) -> Arrays:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def _no_provider(model: str, place: Place) -> Loaded:
    raise ProviderError(f"{place.provider} is not there; use --provider cpu")


steady = Runtime(describe, opener)
busy = Runtime(describe, _busy)
raising = broken(_raise)
dying = broken(_die)
nan = broken(lambda batch: {"output": np.full((len(batch["input_ids"]), 2), np.nan, np.float32)})
narrow = broken(lambda batch: {"output": np.ones((len(batch["input_ids"]), 1), np.float32)})
providerless = Runtime(describe, _no_provider)
