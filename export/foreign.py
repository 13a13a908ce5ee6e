"""A graph of another exporter, held against a checkpoint by the names that they share."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.signature import with_outputs
from export.bundle import read_graph
from export.parity import check_graphs
from export.parts import parts
from export.verdict import ParityReport

_OPTIONAL = {"token_type_ids", "position_ids"}  # a model called without them makes them up itself


def check_foreign(
    checkpoint: Checkpoint,
    path: Path,
    provider: str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Return the gate's report on the outputs that the graph in `path` and the checkpoint share.

    Raises `ModelError` where the graph's inputs are not the checkpoint's, or no output is.
    """
    part = matching_part(checkpoint, path)
    return check_graphs(checkpoint, {path.name: (part, path)}, provider, progress)


def matching_part(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return the part of `checkpoint` that the graph is of, with the inputs and outputs of both."""
    graph = read_graph(path).graph
    given = [str(v.name) for v in graph.inputs if v.name not in graph.initializers]
    made = {str(value.name) for value in graph.outputs}
    problems: list[tuple[int, str]] = []
    found: list[Checkpoint] = []
    for part in _candidates(checkpoint):
        signature = part.signature
        unknown = [name for name in given if name not in signature.names]
        missing = [n for n in signature.names if n not in given and n not in _OPTIONAL]
        outputs = tuple(name for name in signature.outputs if name in made and _filled(name))
        if unknown or missing:
            told = [f"takes {n}, which the model does not" for n in unknown]
            told += [f"does not take {n}, which the model does" for n in missing]
            problems.append((len(told), told[0]))
        elif not outputs:
            told = [f"gives {_listed(made)}, and the model gives {_listed(set(signature.outputs))}"]
            problems.append((0, told[0]))
        else:
            inputs = tuple(item for item in signature.inputs if item.name in given)
            found.append(
                replace(part, signature=replace(signature, inputs=inputs, outputs=outputs))
            )
    if not found:
        raise ModelError(f"{path} cannot be compared with the model: it {min(problems)[1]}")
    return max(found, key=lambda part: len(part.signature.outputs))


def _candidates(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """Yield what a graph may be of: a part, the whole model, or the transformer inside it."""
    yield from parts(checkpoint).values()
    yield checkpoint
    if checkpoint.backbone is not checkpoint.module:
        signature = with_outputs(checkpoint.signature, checkpoint.backbone)
        yield replace(checkpoint, module=checkpoint.backbone, signature=signature)


def _filled(output: str) -> bool:
    # optimum's merged decoders return these empty where they were handed in
    return not (output.startswith("present.") and ".encoder." in output)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
