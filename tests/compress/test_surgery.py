import pytest
import torch
from torch import nn

from calib_data.errors import ModelError
from compress.blocks import Group, Part, find_groups
from compress.surgery import feature_indices, keep_units_, resize_
from tests.tiny import tiny_model


def test_indices_of_units_in_every_copy() -> None:
    part = Part("x", True, width=2, copies=3)
    assert feature_indices(part, units=4, keep=(0, 3)).tolist() == [
        *(0, 1, 6, 7),
        *(8, 9, 14, 15),
        *(16, 17, 22, 23),
    ]


def test_kept_features_are_the_ones_asked_for() -> None:
    model = nn.Module()
    model.up, model.down = nn.Linear(3, 4), nn.Linear(4, 3)
    group = Group("", "neurons", 4, (Part("up", True, 1), Part("down", False, 1)), "down")
    up, bias, down = model.up.weight[[1, 3]], model.up.bias[[1, 3]], model.down.weight[:, [1, 3]]
    keep_units_(model, group, (1, 3))
    assert model.up.weight.equal(up)
    assert model.up.bias.equal(bias)
    assert model.down.weight.equal(down)
    assert (model.up.out_features, model.down.in_features) == (2, 2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert", "gpt_neox"])
def test_resized_model_takes_the_pruned_weights(family: str) -> None:
    pruned, empty = tiny_model(family), tiny_model(family, seed=1)
    structure = {}
    for index, group in enumerate(find_groups(pruned)):
        units = range(index % 2, group.units, 2)
        keep_units_(pruned, group, units)
        structure[group.key] = len(units)
    resize_(empty, structure)
    empty.load_state_dict(pruned.state_dict())
    ids = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        assert empty(ids)[0].equal(pruned(ids)[0])


def test_frozen_weights_stay_frozen() -> None:
    model = tiny_model("bert").requires_grad_(False)
    keep_units_(model, find_groups(model)[0], range(5))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("structure", [{"nothing.heads": 1}, {"encoder.layer.0.neurons": 65},
                                       {"encoder.layer.0.neurons": 0}])  # fmt: skip
def test_impossible_structure_is_refused(structure: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="cannot hold"):
        resize_(tiny_model("bert"), structure)
