"""What is told of each layer after several prunings, by the names and sizes of the beginning."""

from dataclasses import replace

from compress.apply_plan import apply_plan
from compress.checkpoint import Checkpoint
from compress.heads import Classes, with_head
from compress.kept import kept_layers, kept_units, plan_record
from compress.plan import PrunePlan
from compress.prune import PruneConfig, prune
from compress.tasks import get_task
from tests.compress.test_apply_plan import deep_checkpoint, query_plan
from tests.tiny import tiny_batches, tiny_checkpoint

HEADS, NEURONS = "encoder.layer.{}.attention.self.heads", "encoder.layer.{}.neurons"


def after(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """Return what a pruning stage returns that chooses `plan`."""
    made = apply_plan(checkpoint, plan)
    return made.with_stage("prune", **plan_record(checkpoint, plan))


def twice() -> Checkpoint:
    first = PrunePlan(
        {NEURONS.format(1): (0, 3), NEURONS.format(2): (0, 1, 2)}, {"encoder.layer": (1, 2)}
    )
    second = PrunePlan({NEURONS.format(1): (0, 2)}, {"encoder.layer": (1,)}, tuple(range(20)))
    return after(after(deep_checkpoint("bert"), first), second)


def test_layers_have_their_first_numbers() -> None:
    assert kept_layers(twice()) == {"encoder.layer": {"kept": [2], "of": 3}}
    assert kept_layers(deep_checkpoint("bert")) == {}


def test_units_have_their_first_names_and_numbers() -> None:
    found = kept_units(twice())
    assert [found[NEURONS.format(i)] for i in range(3)] == [
        {"kept": 0, "units": 64},
        {"kept": 0, "units": 64},
        {"kept": 2, "units": 64},
    ]
    assert [found[HEADS.format(i)]["kept"] for i in range(3)] == [0, 0, 4]
    assert twice().lineage[-1]["hidden"] == {"kept": 20, "of": 32}


def test_a_new_head_does_not_change_them() -> None:
    made, _ = with_head(twice(), get_task("text-classification"), Classes(2), 0)
    assert kept_units(made) == kept_units(twice())


def test_query_heads_are_told_where_they_were_pruned() -> None:
    whole = tiny_checkpoint("llama")
    key = "layers.0.self_attn.queries"
    assert key not in kept_units(whole)
    assert kept_units(after(whole, query_plan(whole, with_pairs=False)))[key] == {
        "kept": 2,
        "units": 4,
    }


def test_an_unpruned_model_keeps_all() -> None:
    found = kept_units(tiny_checkpoint("bert"))
    assert len(found) == 4
    assert all(row["kept"] == row["units"] for row in found.values())


def test_the_stage_records_it() -> None:
    config = PruneConfig(heads=0.25, ffn=0.5, round_to=8)
    made = prune(tiny_checkpoint("bert"), tiny_batches(), config).checkpoint
    found = kept_units(made)
    assert sum(row["kept"] for name, row in found.items() if name.endswith("neurons")) == 64
    # an older manifest that records nothing: what there is counts as all there was
    assert all(
        row["kept"] == row["units"] for row in kept_units(replace(made, lineage=())).values()
    )
