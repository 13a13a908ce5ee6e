"""Whether a student can learn from a teacher, and how the two meet: found out on two rows of data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calib_data.batches import TEACHER, Batches
from calib_data.errors import ConfigError, DataError, ModelError
from compress.adapters import refuse_adapters
from compress.checkpoint import Checkpoint
from compress.distill_config import DistillConfig
from compress.layer_map import EMBEDDINGS, last_pairs, layer_pairs
from compress.loss_table import LOSSES, loss_terms
from compress.losses import hard_targets
from compress.matching import LAYERS, MAPS, RELATIONS, Kind, Scene, Setup
from compress.observe import Need, Observed, observe, stacks
from compress.training import units

# what is matched when --losses is not given, by the task's output
_DEFAULT = {"sentence_embedding": ("embedding", "similarity", "hidden"), "logits": ("logits",)}


@dataclass(frozen=True)
class Pairing:
    """The losses' weights, how the layers meet, and what must be seen of each side."""

    weights: dict[str, float]
    setup: Setup
    student_needs: frozenset[Need]
    teacher_needs: frozenset[Need]


def pair_up(
    teacher: Checkpoint, student: Checkpoint, batches: Batches, config: DistillConfig
) -> Pairing:
    """Return how `student` and `teacher` meet, after a trial on the first rows of `batches`.

    Raises `ModelError` where the two cannot be compared by the losses chosen, `ConfigError` for
    settings that fit no such pair, `DataError` for labels that are missing.
    """
    _check_pair(teacher, student)
    rows = _first_rows(batches)
    paired = any(name.startswith(TEACHER) for name in rows)
    if not paired:
        _check_inputs(teacher, student)
    default = _DEFAULT.get(student.output, ("hidden",))
    if paired:  # no token of the one is a token of the other
        default = tuple(name for name in default if LOSSES[name].kind is not LAYERS)
    weights = config.mixed(config.weights(default), _labelled(student, rows))
    setup = Setup(student.task_row.target, student.output)
    kinds = {LOSSES[name].kind for name in weights}
    if kinds & {LAYERS, MAPS, RELATIONS}:
        setup = _with_layers(setup, kinds, teacher, student, config)
    needs = [frozenset[Need]().union(*(getattr(k, side) for k in kinds)) for side in _SIDES]
    if LAYERS in kinds and any(EMBEDDINGS in pair for pair in setup.pairs):
        needs = [need | {"embeddings"} for need in needs]
    with torch.no_grad():
        mine = observe(student, rows, needs[0])
        theirs = observe(teacher, teacher_side(rows), needs[1]) if needs[1] else Observed()
        scene = Scene(rows, mine, theirs, setup, one_tokenizer=not paired)
        for name in weights:
            LOSSES[name].kind.check(name, scene)
        if LAYERS in kinds:
            _add_projections_(scene, config.train.seed)
        loss_terms(scene, weights, config, units(rows))  # raises what the formulas do not take
    return Pairing(weights, setup, *needs)


_SIDES = ("student", "teacher")


def teacher_side(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the batch as the teacher is given it: by its own tokenizer, where it has one."""
    own = {k.removeprefix(TEACHER): v for k, v in batch.items() if k.startswith(TEACHER)}
    return own or batch


def _first_rows(batches: Batches, count: int = 2) -> dict[str, Tensor]:
    """Return the first rows of the first batch."""
    for batch in batches:
        return {name: value[:count] for name, value in batch.items()}
    raise DataError("there is no batch to train on; give --data at least one row")


def _check_pair(teacher: Checkpoint, student: Checkpoint) -> None:
    if teacher.task != student.task:
        raise ModelError(
            f"the teacher is for {teacher.task}, the student for {student.task}; pass --task"
        )
    if student.quantization or any(p.dtype == torch.int8 for p in student.module.buffers()):
        raise ModelError("a quantized student cannot be trained; distill first, then quantize")
    refuse_adapters(student, "distill")


def _check_inputs(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raise `ModelError` where one batch cannot be for both."""
    sizes = [c.signature.vocabulary for c in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the student knows {sizes[0]} token ids, the teacher {sizes[1]}; both must belong to "
            "one tokenizer, or each needs its own beside it for embedding, similarity and contrastive"
        )
    images = [
        next((item.shape[1:] for item in c.signature.inputs if item.kind == "pixels"), ())
        for c in (student, teacher)
    ]
    if images[0] != images[1]:
        raise ModelError(
            f"the student takes images of {images[0]}, the teacher of {images[1]}; "
            "they must be of one shape"
        )


def _labelled(student: Checkpoint, rows: Mapping[str, Tensor]) -> bool:
    """Whether the rows hold what the student's task is trained on."""
    with torch.no_grad():
        outputs = observe(student, rows, frozenset({"outputs"})).outputs
    return hard_targets(student.task_row.target, outputs, rows) is not None


def _with_layers(
    setup: Setup,
    kinds: set[Kind],
    teacher: Checkpoint,
    student: Checkpoint,
    config: DistillConfig,
) -> Setup:
    mine, theirs = stacks(student.backbone), stacks(teacher.backbone)
    if len(mine) != len(theirs):
        raise ModelError(
            f"the student has {len(mine)} stacks of layers, the teacher {len(theirs)}; "
            "their layers cannot be matched: use losses of the outputs"
        )
    counts = [[len(stack.layers) for stack in side] for side in (mine, theirs)]
    units = [[stack.unit for stack in side for _ in stack.layers] for side in (mine, theirs)]
    text = config.relation_map
    relation_pairs = last_pairs(*counts) if text == "last" else layer_pairs(text, *counts)
    pairs = layer_pairs(config.layer_map, *counts) if kinds & {LAYERS, MAPS} else ()
    for one, other in (*pairs, *relation_pairs):
        if units[0][max(one, 0)] != units[1][max(other, 0)]:
            raise ConfigError(
                f"layer {one} of the student and {other} of the teacher are in different stacks; "
                "a layer map pairs encoder with encoder, and decoder with decoder"
            )
    return replace(setup, pairs=pairs, relation_pairs=relation_pairs, units=tuple(units[0]))


def _add_projections_(scene: Scene, seed: int) -> None:
    """Add a learned projection wherever two layers that meet differ in width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for match, (mine, theirs) in zip(LAYERS.match(scene), scene.setup.pairs):
            widths = match.student.shape[-1], match.teacher.shape[-1]
            if widths[0] != widths[1]:
                # orthogonal: hidden states keep their size, so the loss starts near that of equals
                projection = nn.Linear(*widths, bias=False)
                nn.init.orthogonal_(projection.weight)
                scene.setup.projections[f"{mine}_{theirs}"] = projection
