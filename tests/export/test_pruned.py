"""What a plan took, in every granularity: trained on, quantized, exported and held to the gate."""

from pathlib import Path
from typing import Any

import pytest

from compress.apply_plan import apply_plan
from compress.blocks import query_groups
from compress.checkpoint import Checkpoint
from compress.distill import distill
from compress.distill_config import DistillConfig
from compress.finetune import FinetuneConfig, finetune
from compress.loading import open_checkpoint
from compress.plan import PrunePlan
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from tests.compress.test_apply_plan import GROUPED, deep_checkpoint, query_plan, some_layers
from tests.compress.test_finetune import BRIEF, LABELS
from tests.compress.test_prune import random_plan
from tests.compress.test_width import KEEP
from tests.export.test_families import DECODERS, SEQ2SEQ, held_to_the_gate
from tests.tiny import SampledBatches, tiny_batches, write

SOME = ("bert", "gpt2", "llama", "t5", "vit")
KINDS = ("units", "queries", "layers", "hidden", "all")


def plan_of(checkpoint: Checkpoint, kind: str) -> PrunePlan:
    """Return a plan that removes what `kind` says."""
    if kind == "queries":
        return query_plan(checkpoint, with_pairs=True)
    units, layers = random_plan(checkpoint).keep, some_layers(checkpoint)
    parts: dict[str, dict[str, Any]] = {
        "units": {"keep": units},
        "layers": {"layers": layers},
        "hidden": {"hidden": KEEP},
    }
    if kind != "all":
        return PrunePlan(**parts[kind])
    if query_groups(checkpoint.backbone):  # with the key/value heads that it keeps
        units |= query_plan(checkpoint, with_pairs=True).keep  # type: ignore[operator]
    return PrunePlan(units, layers, KEEP)


def pruned(family: str, kind: str) -> Checkpoint:
    task = "feature-extraction"
    if family in DECODERS:
        task = "text-generation"
    if family in SEQ2SEQ:
        task = "text2text-generation"
    checkpoint = deep_checkpoint(family, task)
    return apply_plan(checkpoint, plan_of(checkpoint, kind))


def cases(schemes: tuple[str, ...]) -> list[Any]:
    """Return family, granularity and scheme: each granularity in float, all at once in each scheme."""
    found = []
    for family in SOME:
        for kind in KINDS:
            if kind == "queries" and family not in GROUPED:
                continue
            for scheme in schemes if kind == "all" else ("float",):
                few = kind == "all" and (family, scheme) in (("bert", "static"), ("llama", "float"))
                marks = [pytest.mark.slow] if few else [pytest.mark.slow, pytest.mark.exhaustive]
                found.append(pytest.param(family, kind, scheme, marks=marks))
    return found


@pytest.mark.parametrize(
    ("family", "kind", "scheme"), cases(("float", "dynamic", "static", "weight-only"))
)
def test_it_is_quantized_saved_and_exported(
    family: str, kind: str, scheme: str, tmp_path: Path
) -> None:
    made = pruned(family, kind)
    if scheme != "float":
        settings = {"block_size": 16} if scheme == "weight-only" else {}
        made = quantize(made, QuantizeConfig(scheme, **settings), SampledBatches(made)).checkpoint
    again = open_checkpoint(write(made, tmp_path / "saved"), task=made.task)
    sample = made.signature.sample(2, 8, ragged=True)
    assert (again.predict(sample)[made.output] == made.predict(sample)[made.output]).all()
    (tmp_path / "graphs").mkdir()
    held_to_the_gate(again, tmp_path / "graphs")


@pytest.mark.parametrize(
    "kind", [k if k == "all" else pytest.param(k, marks=pytest.mark.exhaustive) for k in KINDS]
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_is_trained_on_and_pruned_again(family: str, kind: str) -> None:
    if kind == "queries" and family != "llama":
        pytest.skip("each of its key/value heads has one query head")
    teacher = deep_checkpoint(family, "text-classification")
    student = apply_plan(teacher, plan_of(teacher, kind))
    batches = tiny_batches(label=LABELS)
    healed = distill(teacher, student, batches, DistillConfig(train=BRIEF))
    assert healed.report["loss_last"] < healed.report["loss_first"]
    assert healed.checkpoint.structure == student.structure
    tuned = finetune(healed.checkpoint, batches, FinetuneConfig(train=BRIEF))
    assert tuned.checkpoint.structure == student.structure
    kept = tuned.checkpoint.hidden_size or 0
    twice = apply_plan(tuned.checkpoint, PrunePlan(hidden=tuple(range(kept - 3))))
    assert twice.hidden_size == kept - 3
