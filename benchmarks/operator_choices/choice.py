"""One place in a graph with the ways to write it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from benchmarks.operator_choices.graph import Build, Graph

TEXTS = ((8, 128), (1, 32))  # batch × length


@dataclass(frozen=True)
class Alternative:
    """One way to write it."""

    build: Build
    error: float = 1e-4  # largest difference to the first alternative, over its largest value


@dataclass(frozen=True)
class Choice:
    """One place in a graph where the exporter has a choice."""

    name: str
    data: Callable[..., SimpleNamespace]  # (random, *shape, **widths) → weights, then inputs
    axes: str  # what the numbers of a shape are
    shapes: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]  # for tests
    alternatives: Mapping[str, Alternative]
    chosen: Mapping[str, str]  # target → the alternative that the exporter emits
    copies: int = 4  # in one graph, so that starting a run weighs little
    widths: Mapping[str, int] = field(default_factory=dict)  # of weights, for `data`


def build(choice: Choice, alternative: str, shape: tuple[int, ...], copies: int = 0) -> Graph:
    """Return an alternative, several times on data of its own."""
    graph = Graph()
    for copy in range(copies or choice.copies):
        data = choice.data(np.random.default_rng(copy), *shape, **choice.widths)
        made = choice.alternatives[alternative].build(graph, data)
        graph.compared += made if isinstance(made, tuple) else (made,)
    return graph


def both(name: str) -> dict[str, str]:
    """Return the same choice for every target."""
    return {"cpu": name, "cuda": name}
