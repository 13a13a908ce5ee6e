import pytest

from calib_data.errors import ConfigError, ModelError
from compress.sizes import StudentShape, student_config
from tests.tiny import tiny_model


def config(family: str, **shape: int) -> dict[str, object]:
    return dict(student_config(tiny_model(family), {}, StudentShape(**shape)).to_dict())


def test_what_is_not_given_stays() -> None:
    before = tiny_model("bert").config.to_dict()
    after = config("bert", ffn=48)
    assert {k: v for k, v in after.items() if before[k] != v} == {"intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", {"hidden_size": 16, "num_attention_heads": 2}),
        ("distilbert", {"dim": 16, "n_heads": 2, "hidden_dim": 64}),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_inner": 128}),
        ("electra", {"hidden_size": 16, "num_attention_heads": 2, "embedding_size": 16}),
        ("opt", {"hidden_size": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}),
        ("llama", {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 8}),
        ("qwen2", {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 8}),
        ("t5", {"d_model": 16, "num_heads": 4, "d_kv": 8}),
        ("vit", {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 8}),
    ],
)
def test_hidden_takes_along_what_the_family_ties_to_it(
    family: str, expected: dict[str, int]
) -> None:
    made = config(family, hidden=16)
    assert {name: made[name] for name in expected} == expected


def test_heads_of_their_own_width_leave_hidden_as_it_is() -> None:
    made = config("qwen3", heads=2)
    assert [made[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")] == [
        32, 2, 1,
    ]  # fmt: skip
    assert made["head_dim"] == 8


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("bert", {"hidden": 20}, "--hidden 16 or 24"),
        ("gpt2", {"hidden": 4}, "--hidden 8$"),
        ("bert", {"heads": 2}, "pass --hidden 16, or --heads 4"),
        ("roberta", {"hidden": 16, "heads": 4}, "pass --hidden 32, or --heads 2"),
        ("llama", {"heads": 3}, "one of 2, 4; got 3"),
        ("bert", {"hidden": 64}, "from 1 to the teacher's 32, got 64"),
        ("mpnet", {"ffn": 65}, "from 1 to the teacher's 64, got 65"),
        ("t5", {"heads": 5}, "from 1 to the teacher's 4, got 5"),
    ],
)
def test_impossible_widths_are_refused_with_possible_ones(
    family: str, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(family, **shape)
    assert "\n" not in str(caught.value)


def test_a_model_without_one_width_is_refused() -> None:
    with pytest.raises(ModelError, match="no one number of heads"):
        config("swin", hidden=8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"layers": 2, "keep_layers": (0, 1)}, "the same thing"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"hidden": -8}, "--hidden must be at least 1"),
        ({"keep_layers": (2, 1)}, "ascending"),
        ({"keep_layers": (1, 1)}, "ascending"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(shape: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentShape.from_json(shape)


def test_an_empty_shape_is_false() -> None:
    assert not StudentShape()
    assert StudentShape(keep_layers=(0,))
    assert StudentShape(ffn=3).narrows
    assert not StudentShape(layers=3).narrows
