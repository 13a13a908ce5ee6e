import pytest

from calib_data.errors import ConfigError
from compress.patterns import check_pattern

NAMES = [
    "embeddings.word_embeddings",
    *(
        f"encoder.layer.{i}.{part}"
        for i in range(3)
        for part in ("attention.self.query", "output.dense")
    ),
    "pooler.dense",
]


@pytest.mark.parametrize("pattern", ["*", "pooler.dense", "encoder.layer.[01].*", "*.query"])
def test_patterns_that_match(pattern: str) -> None:
    check_pattern("--skip", pattern, NAMES)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("encoder.layer.0", "encoder.layer.0.*"),
        ("poolr.dense", "pooler.dense"),
        ("word_embeddings", "*.word_embeddings"),
        ("querry", "*.query"),
        ("model.encoder.layer.0.output.dense", "encoder.layer.0.output.dense"),
        ("xyz", "there are embeddings.word_embeddings"),
    ],
)
def test_a_mistyped_pattern_is_told_with_what_comes_near(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError, match="matches no layer") as caught:
        check_pattern("--skip", pattern, NAMES)
    assert near in str(caught.value)
    assert f"--skip {pattern}" in str(caught.value)
