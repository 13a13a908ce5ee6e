"""Which layer of the student learns from which of the teacher."""

import re
from collections.abc import Sequence

from calib_data.errors import ConfigError, ModelError
from compress.students import evenly_spaced

EMBEDDINGS = -1  # what the first layer is given, counted as a layer before it
NAMED = ("uniform", "last")


def is_layer_map(text: str) -> bool:
    """Whether `text` is `uniform`, `last`, or pairs as in `0:1,2:5`."""
    pair = r"\s*(-1|\d+)\s*:\s*(-1|\d+)\s*"
    return text in NAMED or re.fullmatch(rf"{pair}(,{pair})*", text) is not None


def layer_pairs(
    text: str, student: Sequence[int], teacher: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return pairs (student's layer, teacher's layer) of models with these numbers of layers.

    There is one number for a model with one stack, two for an encoder–decoder, whose layers are
    counted through: its decoder's follow its encoder's. `uniform` spreads the student's layers
    evenly over the teacher's, last to last; `last` meets the teacher's last ones; `0:1,2:5` says it,
    −1 being the embeddings. Raises `ConfigError` for a layer that there is not, `ModelError` where
    the student has more layers than the teacher.
    """
    if text in NAMED:
        pairs: list[tuple[int, int]] = []
        for stack, (few, many) in enumerate(zip(student, teacher, strict=True)):
            before = sum(student[:stack]), sum(teacher[:stack])
            chosen = _spread(few, many) if text == "uniform" else range(many - few, many)
            _check_depth(few, many)
            pairs += [(before[0] + i, before[1] + j) for i, j in enumerate(chosen)]
        return tuple(pairs)
    found = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
    for mine, theirs in found:
        for name, layer, count in (
            ("student", mine, sum(student)),
            ("teacher", theirs, sum(teacher)),
        ):
            if layer >= count:
                raise ConfigError(
                    f"the layer map {text} names layer {layer} of the {name}, which has 0 to "
                    f"{count - 1} (and -1, its embeddings)"
                )
    return tuple((mine, theirs) for mine, theirs in found)


def last_pairs(student: Sequence[int], teacher: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the last layer of each stack of the student with that of the teacher."""
    counts = range(1, len(student) + 1)
    return tuple((sum(student[:n]) - 1, sum(teacher[:n]) - 1) for n in counts)


def _spread(few: int, many: int) -> list[int]:
    _check_depth(few, many)
    return [many - 1] if few == 1 else evenly_spaced(many, few)


def _check_depth(few: int, many: int) -> None:
    if few > many:
        raise ModelError(
            f"the student has {few} layers, the teacher only {many}; give pairs with --layer-map, "
            "as in 0:0,2:1"
        )
