"""What a loss compares: tensors of a student beside those of its teacher, and what they are counted in.

A kind is one row: what must be seen of both models, how the tensors meet, and what must agree. The
table of losses (`loss_table`) gives each loss a kind and a formula.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, DataError, ModelError
from compress.losses import hard_targets, next_labels
from compress.observe import Need, Observed
from compress.tasks import Target


@dataclass(frozen=True)
class Match:
    """Two tensors to compare, and the positions that count.

    A formula gives values (B,), (N,) or (B, T); `mask` (B, T) says which of the latter count, None
    all: then a row's mean counts. `unit` names what the sum is divided by (`training.units`).
    """

    student: Tensor
    teacher: Tensor
    unit: str
    mask: Tensor | None = None
    share: float = 1.0  # of the term, where several matches make one

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of the `values` that count, a scalar."""
        if self.mask is not None:
            return values[self.mask.bool()].sum()
        return values.flatten(1).mean(dim=1).sum() if values.dim() > 1 else values.sum()


@dataclass(frozen=True)
class Setup:
    """What is the same for every batch: the task, and which layers meet."""

    target: Target
    output: str  # what the task's metrics look at
    pairs: tuple[tuple[int, int], ...] = ()  # (student's layer, teacher's layer)
    relation_pairs: tuple[tuple[int, int], ...] = ()
    units: tuple[str, ...] = ()  # of each of the student's layers
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # to the teacher's width


@dataclass(frozen=True)
class Scene:
    """A batch, and what was seen of both models on it."""

    batch: Mapping[str, Tensor]
    student: Observed
    teacher: Observed
    setup: Setup
    one_tokenizer: bool = True  # whether both were given the same tokens


@dataclass(frozen=True)
class Kind:
    """One kind of comparison."""

    student: frozenset[Need]
    teacher: frozenset[Need]
    match: Callable[[Scene], list[Match]]
    check: Callable[[str, Scene], None]  # raises ModelError, given the loss's name


# --- the outputs ------------------------------------------------------------------------------------


def _match_logits(scene: Scene) -> list[Match]:
    mine, theirs = (seen.outputs["logits"] for seen in (scene.student, scene.teacher))
    if mine.dim() == 2:
        return [Match(mine, theirs, "rows")]
    mask, unit = _predicted(scene, mine)
    return [Match(mine[mask], theirs[mask], unit)]


def _predicted(scene: Scene, logits: Tensor) -> tuple[Tensor, str]:
    """Return which of the logits (B, T, classes) count, (B, T), and in which unit.

    Where labels tell what is predicted, those that they leave out (−100) do not count.
    """
    labels = scene.batch.get("labels")
    if labels is None or labels.shape != logits.shape[:2]:
        return _tokens(scene.batch, logits)
    if scene.setup.target == "next-token":
        following = next_labels(scene.batch) != -100
        return torch.cat([following, torch.zeros_like(following[:, :1])], dim=1), "labels"
    return labels != -100, "labels"


def _check_logits(name: str, scene: Scene) -> None:
    mine, theirs = (seen.outputs.get("logits") for seen in (scene.student, scene.teacher))
    if mine is not None and mine.dim() == 3:
        _check_tokens(name, scene)
    if mine is None or theirs is None or mine.shape != theirs.shape:
        raise ModelError(
            f"the loss {name!r} needs the same logits of both: the student gives {_shape(mine)}, "
            f"the teacher {_shape(theirs)}"
        )


def _check_distribution(name: str, scene: Scene) -> None:
    _check_logits(name, scene)
    if scene.student.outputs["logits"].shape[-1] == 1:
        raise ModelError(
            f"the loss {name!r} compares distributions over classes and the models give one number; "
            "use --losses logits-mse"
        )


def _match_labels(scene: Scene) -> list[Match]:
    found = hard_targets(scene.setup.target, scene.student.outputs, scene.batch)
    if found is None:
        return []
    unit = "labels"
    if scene.setup.target == "next-token":
        labels = scene.batch.get("labels")
        given = labels is not None and labels.shape == scene.batch["input_ids"].shape
        unit = "labels" if given else "next"
    return [Match(*found, unit)]


def _check_labels(name: str, scene: Scene) -> None:
    if not _match_labels(scene):
        raise DataError(
            f"the loss {name!r} is the task's own, and there are no labels for it; give --data with "
            "labels (--columns label=COLUMN), or use --alpha 1"
        )


def _match_vectors(scene: Scene) -> list[Match]:
    name = scene.setup.output
    return [Match(scene.student.outputs[name], scene.teacher.outputs[name], "rows")]


def _check_one_vector(name: str, scene: Scene) -> None:
    found = [seen.outputs.get(scene.setup.output) for seen in (scene.student, scene.teacher)]
    if any(value is None or value.dim() != 2 for value in found):
        raise ModelError(
            f"the loss {name!r} needs one vector per example, as sentence encoders give; "
            "pass --task sentence-embedding"
        )


def _check_same_vector(name: str, scene: Scene) -> None:
    _check_one_vector(name, scene)
    match = _match_vectors(scene)[0]
    if match.student.shape != match.teacher.shape:
        raise ModelError(
            f"the loss {name!r} needs the same {scene.setup.output} of both: the student gives "
            f"{_shape(match.student)}, the teacher {_shape(match.teacher)}; similarity takes any width"
        )


# --- the layers -------------------------------------------------------------------------------------


def _match_layers(scene: Scene) -> list[Match]:
    setup = scene.setup
    matches = []
    for mine, theirs in setup.pairs:
        state = _state(scene.student, mine)
        key = f"{mine}_{theirs}"
        if key in setup.projections:
            state = setup.projections[key](state)
        mask, unit = _positions(scene, setup.units[max(mine, 0)], state)
        other = _state(scene.teacher, theirs)
        matches.append(Match(state, other, unit, mask, 1 / len(setup.pairs)))
    return matches


def _state(seen: Observed, layer: int) -> Tensor:
    return seen.embeddings[0] if layer < 0 else seen.layers[layer]


def _match_maps(scene: Scene) -> list[Match]:
    pairs = [(mine, theirs) for mine, theirs in scene.setup.pairs if min(mine, theirs) >= 0]
    matches = []
    for mine, theirs in pairs:
        maps = scene.student.attention[mine].maps()  # (B, H, T, T)
        mask, unit = _positions(scene, scene.setup.units[mine], maps.transpose(1, 2))
        other = scene.teacher.attention[theirs].maps()
        matches.append(Match(maps, other, unit, mask, 1 / len(pairs)))
    return matches


def _check_maps(name: str, scene: Scene) -> None:
    _check_tokens(name, scene)
    if not any(min(pair) >= 0 for pair in scene.setup.pairs):
        raise ConfigError(
            f"the loss {name!r} compares layers that attend, and --layer-map pairs embeddings only"
        )


def _match_relations(scene: Scene) -> list[Match]:
    pairs = scene.setup.relation_pairs
    matches = []
    for mine, theirs in pairs:
        one, other = scene.student.attention[mine], scene.teacher.attention[theirs]
        mask, unit = _positions(scene, scene.setup.units[mine], one.query.transpose(1, 2))
        for x, y in ((one.query, other.query), (one.key, other.key), (one.value, other.value)):
            matches.append(Match(x, y, unit, mask, 1 / len(pairs)))
    return matches


def _check_tokens(name: str, scene: Scene) -> None:
    if not scene.one_tokenizer:
        raise ModelError(
            f"the loss {name!r} compares token by token, and teacher and student have tokenizers of "
            "their own; use embedding, similarity or contrastive"
        )


def _positions(scene: Scene, unit: str, value: Tensor) -> tuple[Tensor | None, str]:
    """Return which positions of `value` (B, T, …) count, (B, T), and the unit; None: a row's mean."""
    if unit == "labels":
        return scene.batch["labels"] != -100, unit
    if "input_ids" in scene.batch and scene.batch["input_ids"].shape == value.shape[:2]:
        return _tokens(scene.batch, value)
    return None, "rows"


def _tokens(batch: Mapping[str, Tensor], value: Tensor) -> tuple[Tensor, str]:
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device), "tokens"
    return mask.bool(), "tokens"


def _shape(value: Tensor | None) -> str:
    return "none" if value is None else str(tuple(value.shape[1:]))


def _kind(
    need: Need,
    match: Callable[[Scene], list[Match]],
    check: Callable[[str, Scene], None],
    *also: Need,
) -> Kind:
    needs = frozenset((need, *also))
    return Kind(needs, needs, match, check)


LABELS = Kind(frozenset(("outputs",)), frozenset(), _match_labels, _check_labels)
LOGITS = _kind("outputs", _match_logits, _check_logits)
DISTRIBUTION = _kind("outputs", _match_logits, _check_distribution)
VECTOR = _kind("outputs", _match_vectors, _check_one_vector)
SAME_VECTOR = _kind("outputs", _match_vectors, _check_same_vector)
LAYERS = _kind("layers", _match_layers, _check_tokens)
MAPS = _kind("attention", _match_maps, _check_maps)
RELATIONS = _kind("attention", _match_relations, _check_tokens)
