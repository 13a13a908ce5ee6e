"""Opening a data set: from a file, the Hugging Face hub, or one that is built in.

Whatever the source calls its columns, an `Examples` names them by what they are for: `text`,
`text_pair`, `label`, `score`, `image`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from calib_data.errors import ConfigError, DataError
from calib_data.readers import TABLES, Part, parts_of, read_table
from calib_data.variation import varied

ROLES = ("text", "text_pair", "label", "score", "image")
ALIASES = {
    "text": "text sentence sentence1 sentence_1 sentence_a text1 text_a premise question query "
    "content review description utterance",
    "text_pair": "text_pair sentence2 sentence_2 sentence_b text2 text_b hypothesis context "
    "passage document answer",
    "label": "label labels class target intent",
    "score": "score similarity similarity_score relatedness_score",
    "image": "image img pixels pixel_values",
}
_ROLE_OF = {alias: role for role, aliases in ALIASES.items() for alias in aliases.split()}


@dataclass(frozen=True)
class Examples:
    """Rows of a data set, whose columns are named by role."""

    dataset: datasets.Dataset
    spec: str
    label_names: tuple[str, ...] | None = None  # what class index 0, 1, … stands for

    @property
    def roles(self) -> frozenset[str]:
        """The roles there are."""
        return frozenset(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def column(self, role: str) -> list[Any]:
        """Return the values of one role; images as uint8 or float32, (H, W) or (H, W, C)."""
        if role not in self.roles:
            raise DataError(
                f"{self.spec} has no {role}, only {', '.join(sorted(self.roles))}; "
                f"name the column with --columns {role}=COLUMN"
            )
        if role == "image":
            images = map(np.asarray, self.dataset.with_format("numpy")[:][role])
            # datasets widens whole numbers to int64 on their way out
            return [x.astype(np.float32 if x.dtype.kind == "f" else np.uint8) for x in images]
        return list(self.dataset[role])

    def limit(self, count: int | None, seed: int = 0) -> "Examples":
        """Return at most `count` examples, a seeded choice in their own order; None keeps all."""
        chosen = _choose(len(self), count, seed)
        return self if len(chosen) == len(self) else self.rows(chosen)

    def rows(self, indices: Iterable[int]) -> "Examples":
        """Return the examples at these indices, in this order."""
        return replace(self, dataset=self.dataset.select(indices, keep_in_memory=True))

    def relabel(self, names: Sequence[str]) -> "Examples":
        """Return the examples with labels as indices into `names`, a model's own class names.

        Examples whose labels are plain numbers come back as they are. Raises DataError for a
        label that the model does not know.
        """
        if self.label_names is None or self.label_names == tuple(names):
            return self
        if unknown := sorted(set(self.label_names) - set(names)):
            raise DataError(
                f"{self.spec} has labels that the model lacks: {', '.join(unknown)}; "
                f"it knows {', '.join(names)}"
            )
        index = [list(names).index(name) for name in self.label_names]
        labels = [index[label] for label in self.column("label")]
        columns = {role: self.column(role) for role in self.dataset.column_names}
        return Examples(_dataset(columns | {"label": labels}), self.spec, tuple(names))


def open_data(
    spec: str, columns: str | None = None, limit: int | None = None, seed: int = 0
) -> Examples:
    """Return the examples that `spec` names, at most `limit`, chosen by `seed`.

    `columns` is either `sentence1,sentence2,score`, the names of a CSV or TSV file without a
    header (`_` skips one), or `text=body,label=class`, the roles of named columns. Rows with a
    blank text are left out.

    Several specs joined by commas, as in `a.txt,b.csv,pydoc`, give the texts of all, pairs as two,
    each text once; `columns` then has one part for each, joined by semicolons. `5*b.csv` takes the
    texts of a small source five times, lest a large one drown it; `5~b.csv` once, and four times
    altered, lest they be learned by heart (see `calib_data.variation`).

    Raises DataError for data that cannot be read, lacks a usable column or is empty, and
    ConfigError for settings that make no sense.
    """
    if (parts := parts_of(spec)) != [Part(spec)]:
        return _mixture(parts, columns, spec).limit(limit, seed)
    positions, mapping = _parse_columns(columns)
    if positions and Path(spec).suffix.lower() not in TABLES:
        raise ConfigError(
            f"--columns {columns} is for a CSV or TSV file without a header, and {spec} is none; "
            "use --columns role=column, or leave it out"
        )
    source = read_table(spec, positions)
    assigned = _assign_roles(list(source), mapping, spec, headed=not positions)
    # Images stay where they are until it is known which rows are kept: decoding them is slow.
    data = {role: source[c] if role == "image" else source[c][:] for role, c in assigned.items()}
    texts = [_texts(data[role], role, spec) for role in ("text", "text_pair") if role in data]
    length = len(next(iter(data.values())))
    rows = [i for i in range(length) if all(column[i].strip() for column in texts)]
    if not rows:
        raise DataError(f"{spec} holds no examples; check the file, and the split")
    # Scores and labels are checked whole, so that neither classes nor errors depend on the limit.
    names = None
    chosen = _choose(len(rows), limit, seed)
    kept: dict[str, list[Any]] = {}
    for role, column in data.items():
        if role == "score":
            scores = [_score(column[i], i, spec) for i in rows]
            kept[role] = [scores[i] for i in chosen]
        elif role == "label":
            names = getattr(source[assigned[role]], "names", None)
            labels, names = _labels([column[i] for i in rows], names, rows, spec)
            kept[role] = [labels[i] for i in chosen]
        else:
            kept[role] = [column[rows[i]] for i in chosen]
    if "image" in kept:
        kept["image"] = _images(kept["image"], spec)
    return Examples(_dataset(kept), spec, names)


def _mixture(parts: Sequence[Part], columns: str | None, spec: str) -> Examples:
    """Return the texts of several sources: all once, then those that are to come again."""
    each = columns.split(";") if columns else [""] * len(parts)
    if len(each) != len(parts):
        raise ConfigError(
            f"--columns {columns} has {len(each)} parts for {len(parts)} sources; join one for each "
            "with ; and leave those empty that need none, as in 'text,_;;text=body'"
        )
    times: dict[str, int] = {}  # of a text that several sources have, the most that one asks for
    altered: list[str] = []
    for part, own in zip(parts, each):
        if part.times < 1:
            raise ConfigError(
                f"{spec} takes {part.spec} {part.times} times; leave it out, or take it once"
            )
        examples = open_data(part.spec, own.strip() or None)
        roles = [role for role in ("text", "text_pair") if role in examples.roles]
        if not roles:
            raise DataError(
                f"{part.spec} has no text; only texts can be joined with commas, or taken several times"
            )
        texts = [text for role in roles for text in examples.column(role)]
        for text in texts:
            times[text] = max(times.get(text, 0), 1 if part.varied else part.times)
        if part.varied:
            altered += [varied(t, turn, texts) for turn in range(1, part.times) for t in texts]
    most = max(times.values())
    taken = [text for turn in range(most) for text, n in times.items() if n > turn]
    return Examples(_dataset({"text": [*taken, *altered]}), spec)


def _choose(length: int, count: int | None, seed: int) -> list[int]:
    if count is not None and count < 1:
        raise ConfigError(f"the limit must be at least 1, got {count}")
    if count is None or count >= length:
        return list(range(length))
    return np.sort(np.random.default_rng(seed).choice(length, count, replace=False)).tolist()


def _dataset(columns: Mapping[str, list[Any]]) -> datasets.Dataset:
    """Return an in-memory data set: nothing is cached on disk."""
    return datasets.Dataset.from_dict(dict(columns))


# --- columns -------------------------------------------------------------------------------------


def _parse_columns(columns: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the names by position, or the column of each role; one of them is empty."""
    if columns is None:
        return [], {}
    parts = [part.strip() for part in columns.split(",")]
    named = ["=" in part for part in parts]
    if any(named) != all(named) or not all(parts):
        raise ConfigError(
            f"--columns {columns} must be either names by position, as in sentence1,sentence2,score"
            ", or roles, as in text=body,label=class"
        )
    pairs = [part.partition("=")[::2] for part in parts] if named[0] else [(p, p) for p in parts]
    mapping: dict[str, str] = {}
    for alias, column in pairs:
        role = _ROLE_OF.get(alias.strip().lower())
        if role is None and (named[0] or alias != "_"):
            raise ConfigError(
                f"--columns {columns}: {alias or 'an empty name'} is not a role; "
                f"the roles are {', '.join(ROLES)}" + ("" if named[0] else ", and _ skips a column")
            )
        if role in mapping:
            raise ConfigError(f"--columns {columns} names the {role} twice; keep one of them")
        if role is not None:
            mapping[role] = column.strip()
    return ([], mapping) if named[0] else (parts, mapping)


def _assign_roles(
    names: list[str], mapping: dict[str, str], spec: str, headed: bool
) -> dict[str, str]:
    """Return the column of each role."""
    there = ", ".join(names)
    if mapping:
        lowered = {name.strip().lower(): name for name in reversed(names)}
        assigned = {}
        for role, wanted in mapping.items():
            column = wanted if wanted in names else lowered.get(wanted.lower())
            if column is None:
                raise DataError(f"{spec} has no column {wanted}; it has {there}")
            assigned[role] = column
    else:
        assigned = _guess_roles(names, spec)
    if not assigned.keys() & {"text", "image"}:
        tabular = headed and Path(spec).suffix.lower() in TABLES
        cure = (
            "if that is a header, use --columns text=COLUMN; if the file has none, name its columns"
            " in order, as in --columns sentence1,sentence2,score"
            if tabular
            else "use --columns text=COLUMN"
        )
        shown = there if len(there) <= 160 else there[:160] + "…"
        raise DataError(f"{spec} has no column known as text or image, but: {shown}; {cure}")
    return assigned


def _guess_roles(columns: list[str], spec: str) -> dict[str, str]:
    candidates: dict[str, list[str]] = {}
    for name in columns:
        if role := _ROLE_OF.get(name.strip().lower()):
            candidates.setdefault(role, []).append(name)
    assigned = {}
    for role, names in candidates.items():
        exact = [name for name in names if name.strip().lower() == role]
        if len(exact or names) > 1:
            raise DataError(
                f"{spec} has several columns for {role}: {', '.join(names)}; "
                f"choose with --columns {role}=COLUMN and the other roles alike"
            )
        assigned[role] = (exact or names)[0]
    return assigned


# --- values --------------------------------------------------------------------------------------


def _texts(values: Sequence[Any], role: str, spec: str) -> list[str]:
    texts = ["" if value is None else value for value in values]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"{spec}, row {i + 1}: {role} is {text!r:.40}, not a string; "
                "choose another column with --columns"
            )
    return texts


def _score(value: Any, row: int, spec: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(
            f"{spec}, row {row + 1}: score {value!r:.40} is not a finite number; mend or remove it"
        )
    return score


def _labels(
    values: list[Any], names: Sequence[str] | None, rows: list[int], spec: str
) -> tuple[list[int], tuple[str, ...] | None]:
    """Return class indices, and the names where the labels were strings."""
    for row, value in zip(rows, values):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{spec}, row {row + 1} has no label; add it or remove the row")
    numbers = [_number(value) for value in values]
    if None in numbers and all(isinstance(value, str) for value in values):
        found = tuple(sorted({value.strip() for value in values}))
        index = {name: i for i, name in enumerate(found)}
        return [index[value.strip()] for value in values], found
    for row, value, number in zip(rows, values, numbers):
        if number is None or number != int(number):
            raise DataError(
                f"{spec}, row {row + 1}: label {value!r:.40} is not a class; "
                "if it is a score, use --columns score=COLUMN and the other roles alike"
            )
    indices = [int(number) for number in numbers if number is not None]
    return indices, tuple(names) if names else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _images(values: list[Any], spec: str) -> list[np.ndarray]:
    """Return arrays of one rank: uint8 in 0..255, or float32 as given."""
    images = []
    for i, value in enumerate(values):
        if hasattr(value, "convert"):  # a PIL image, which may be of a palette or have an alpha
            value = value.convert("L" if value.mode in ("1", "L") else "RGB")
        try:
            image = np.asarray(value)
            whole = np.issubdtype(image.dtype, np.integer)
            if image.ndim not in (2, 3) or (whole and not 0 <= image.min() <= image.max() <= 255):
                raise ValueError
            images.append(image.astype(np.uint8 if whole else np.float32))
        except (TypeError, ValueError):
            raise DataError(
                f"{spec}, image {i + 1} is not an H×W or H×W×C array of numbers, "
                "whole ones in 0..255; choose another column with --columns image=COLUMN"
            ) from None
    if len({image.ndim for image in images}) > 1:  # greyscale ones among those in colour
        images = [np.stack([x] * 3, axis=-1) if x.ndim == 2 else x for x in images]
    return images
