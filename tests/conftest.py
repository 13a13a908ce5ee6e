"""Which tests `make test` leaves to `make check`, and both to `make proof`."""

import pytest

# families whose modules are another one's, or made of the same blocks as some that stay
ALIKE = (
    *(
        "camembert",
        "clip_vision_model",
        "deit",
        "distilbert",
        "electra",
        "gemma",
        "gpt_neox",
        "marian",
    ),
    *("mistral", "opt", "phi", "qwen2", "qwen3", "roberta", "xlm-roberta"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on a family that is like another one as exhaustive; leave out what wants quiet."""
    loud = "quiet" not in config.option.markexpr
    for item in items:
        if loud and item.get_closest_marker("quiet"):
            item.add_marker(pytest.mark.skip(reason="wants an idle machine: `make proof` runs it"))
        call = getattr(item, "callspec", None)
        values = call.params.values() if call else ()
        if any(isinstance(value, str) and value in ALIKE for value in values):
            item.add_marker(pytest.mark.exhaustive)
