import pytest
from torch import nn

from calib_data.errors import ModelError
from compress.blocks import features, find_groups, input_columns, locked_attentions
from tests.tiny import FAMILIES, tiny_model

NEURONS_ONLY = {"mpnet", "t5"}  # the heads share a bias between layers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_heads_and_neurons(family: str) -> None:
    groups = find_groups(tiny_model(family))
    layers = 4 if family in ("bart", "t5") else 2
    neurons = [g.units for g in groups if g.kind == "neurons"]
    assert neurons == [128 if family == "gpt2" else 64] * layers
    heads = [g.units for g in groups if g.kind == "heads"]
    grouped = family in ("gemma", "llama", "mistral", "qwen2", "qwen3")
    cross = 2 if family == "bart" else 0
    expected = [] if family in NEURONS_ONLY else [2 if grouped else 4] * (layers + cross)
    assert heads == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_cover_their_projections(family: str) -> None:
    model = tiny_model(family)
    for group in find_groups(model):
        for part in group.parts:
            inputs, outputs = features(model.get_submodule(part.module))
            size = outputs if part.outputs else inputs
            assert group.units * part.width * part.copies == size, part


def test_locked_attentions_are_those_with_a_shared_bias() -> None:
    assert {f for f in FAMILIES if any(locked_attentions(tiny_model(f)))} == NEURONS_ONLY


def test_deberta_with_position_projections_keeps_its_heads() -> None:
    model = tiny_model("deberta-v2", share_att_key=False)
    assert list(locked_attentions(model))
    assert {g.kind for g in find_groups(model)} == {"neurons"}


def test_conv1d_has_its_axes_the_other_way_round() -> None:
    attention = tiny_model("gpt2").h[0].attn
    assert features(attention.c_attn) == (32, 96)
    assert features(nn.Linear(3, 5)) == (3, 5)
    assert input_columns(attention.c_proj, attention.c_proj.weight).equal(
        attention.c_proj.weight.t()
    )


def test_unknown_block_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"Sequential: no attention.*query, q_lin.*onnxpress_blocks"
    ):
        find_groups(nn.Sequential(nn.Linear(3, 3)))
