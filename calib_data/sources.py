"""Opening a data set: from a file, the Hugging Face hub, or one that is built in.

Whatever the source calls its columns, an `Examples` names them by what they are for: `text`,
`text_pair`, `label`, `score`, `image`.
"""

import csv
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from calib_data import embedded
from calib_data.errors import ConfigError, DataError

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

SUPPORTED = (
    "files ending in .jsonl, .json (one object per line), .csv, .tsv, .parquet, .txt, .text or a "
    "language such as .en (one text per line), .npz (images), two files of lines as in "
    "train.de+train.en, whole:FILE[:train|:test], hf:NAME[/CONFIG]:SPLIT, pydoc[:train|:test], "
    "digits[:train|:test]"
)
TRAIN_SHARE = 0.9  # of the characters of whole:FILE:train; whole:FILE:test has the rest
_NPZ = re.compile(r"(.+\.npz)(?::(\w+))?")
_WHOLE = re.compile(r"whole:(.+?)(?::(train|test))?")
# names of arrays in an .npz file, each followed by _SPLIT if there are several
_NPZ_ROLES = {"image": ("x", "image", "images", "pixels"), "label": ("y", "label", "labels")}
# Every reader returns whole columns by name; a column is anything with a length and an index.
_Table = dict[str, Sequence[Any]]


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
        if len(chosen) == len(self):
            return self
        return replace(self, dataset=self.dataset.select(chosen, keep_in_memory=True))

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
    blank text are left out. Raises DataError for data that cannot be read, lacks a usable column
    or is empty, and ConfigError for settings that make no sense.
    """
    positions, mapping = _parse_columns(columns)
    if positions and Path(spec).suffix.lower() not in _TABLES:
        raise ConfigError(
            f"--columns {columns} is for a CSV or TSV file without a header, and {spec} is none; "
            "use --columns role=column, or leave it out"
        )
    source = _read(spec, positions)
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
        tabular = headed and Path(spec).suffix.lower() in _TABLES
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


# --- readers -------------------------------------------------------------------------------------


class _Column(Sequence[Any]):
    """A column of a `datasets.Dataset`, read when indexed, with its class names if it has any."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self.values = dataset[name]
        self.names = getattr(dataset.features[name], "names", None)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]


def _columns_of(dataset: datasets.Dataset) -> _Table:
    return {name: _Column(dataset, name) for name in dataset.column_names}


def _read(spec: str, positions: list[str]) -> _Table:
    if spec.startswith("hf:"):
        return _read_hub(spec)
    if re.match(r"(pydoc|digits)(:|$)", spec):
        return _read_embedded(spec)
    if whole := _WHOLE.fullmatch(spec):
        return {"text": [_read_whole(*whole.groups())]}
    if npz := _NPZ.fullmatch(spec):
        return _read_npz(Path(npz[1]), npz[2])
    if "+" in spec and not Path(spec).is_file():
        return _read_aligned(spec)
    return _read_file(spec, positions)


def data_files(spec: str) -> list[Path]:
    """Return the files that `spec` reads; none for data that is built in or on the hub."""
    if whole := _WHOLE.fullmatch(spec):
        return [Path(whole[1])]
    if npz := _NPZ.fullmatch(spec):
        return [Path(npz[1])]
    paths = [Path(spec)] if Path(spec).is_file() else [Path(part) for part in spec.split("+")]
    return paths if all(path.is_file() for path in paths) else []


def _read_aligned(spec: str) -> _Table:
    """Return two files of lines as pairs: row by row, the first's texts and the second's."""
    parts = spec.split("+")
    if len(parts) != 2:
        raise DataError(f"{spec} joins {len(parts)} files; name two, as in train.de+train.en")
    columns = []
    for part in parts:
        if Path(part).suffix.lower() in {**_TABLES, **_READERS}:
            raise DataError(f"{part} is no file of lines; only these can be joined with +")
        columns.append(_read_file(part, [])["text"])
    if len(columns[0]) != len(columns[1]):
        counts = " and ".join(str(len(column)) for column in columns)
        raise DataError(f"{spec} has {counts} lines; pairs need as many in both files")
    return {"text": columns[0], "text_pair": columns[1]}


def _read_whole(name: str, split: str | None) -> str:
    """Return a file as one text, or its first 90 % (train) or the rest (test) in characters."""
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{name} is not a file; check the path (now in {Path.cwd()})")
    text = _decode(path)
    cut = int(TRAIN_SHARE * len(text))
    return {"train": text[:cut], "test": text[cut:], None: text}[split]


def _read_npz(path: Path, split: str | None) -> _Table:
    """Return the images and labels of one split: arrays `x_SPLIT` and `y_SPLIT`, or `x` and `y`."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; check the path (now in {Path.cwd()})")
    try:
        # Never unpickled: an array of objects raises ValueError.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {_one_line(error)}") from error
    found: dict[str, _Table] = {}
    for role, prefixes in _NPZ_ROLES.items():
        for name, array in arrays.items():
            prefix, _, kind = name.partition("_")
            if prefix in prefixes:
                found.setdefault(kind, {})[role] = (
                    list(array) if role == "image" else array.tolist()
                )
    usable = {kind: table for kind, table in found.items() if "image" in table}
    wanted = split or ("" if "" in usable else "train")
    if wanted not in usable:
        kinds = ", ".join(f"{path}:{kind}" for kind in usable if kind) or "x_train and y_train"
        raise DataError(
            f"{path} has no images of {wanted or 'any split'}, its arrays are "
            f"{', '.join(arrays)}; use {kinds}"
        )
    lengths = {role: len(column) for role, column in usable[wanted].items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path} has {lengths['image']} images and {lengths['label']} labels")
    return usable[wanted]


def _read_file(spec: str, positions: list[str]) -> _Table:
    path = Path(spec)
    suffix = path.suffix.lower()
    lines = suffix in (".txt", ".text") or re.fullmatch(r"\.[a-z]{2}", suffix)
    if suffix not in {**_READERS, **_TABLES} and not lines:
        raise DataError(f"{spec} is no data set I can open; I open {SUPPORTED}")
    if not path.is_file():
        raise DataError(f"{spec} is not a file; check the path (now in {Path.cwd()})")
    try:
        if suffix in _TABLES:
            return _with_header(_TABLES[suffix](path), positions, spec)
        return _READERS[suffix](path) if suffix in _READERS else {"text": _lines(path)}
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are of these families
        raise DataError(f"{spec} cannot be read as {suffix}: {_one_line(error)}") from error


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # every byte is a character: this cannot fail


def _lines(path: Path) -> list[str]:
    # Not splitlines(): it also splits at form feeds and such, which sentences may contain.
    lines = [line.removesuffix("\r") for line in _decode(path).split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _read_csv(path: Path) -> list[list[str]]:
    # Not pyarrow's reader: it guesses types, and a text column may hold numbers, dates or "null".
    return [row for row in csv.reader(io.StringIO(_decode(path), newline=""), strict=True) if row]


def _read_tsv(path: Path) -> list[list[str]]:
    # No quoting across fields or lines, as sentences with a single stray quote are common.
    rows = [line.split("\t") for line in _lines(path) if line.strip()]
    return [[_unquote(field) for field in row] for row in rows]


def _unquote(field: str) -> str:
    if len(field) < 2 or field[0] != '"' or field[-1] != '"':
        return field
    inner = field[1:-1].replace('""', "\0")
    return field if '"' in inner else inner.replace("\0", '"')  # '"a" and "b"' is not wrapped


def _with_header(rows: list[list[str]], positions: list[str], spec: str) -> _Table:
    if not rows:
        raise DataError(f"{spec} is empty; check the file")
    header, rows = (positions, rows) if positions else (rows[0], rows[1:])
    for i, row in enumerate(rows):
        if len(row) != len(header):
            where = "--columns names" if positions else "the header has"
            cure = "; _ skips a column" if positions else ""
            raise DataError(
                f"{spec}, row {i + 1} has {len(row)} fields, {where} {len(header)}{cure}"
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(header) if name != "_"}


def _read_jsonl(path: Path) -> _Table:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {_one_line(error)}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object; write one on each line")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> _Table:
    import pyarrow.parquet

    return _columns_of(datasets.Dataset(pyarrow.parquet.read_table(path)))


_TABLES: dict[str, Callable[[Path], list[list[str]]]] = {".csv": _read_csv, ".tsv": _read_tsv}
_READERS: dict[str, Callable[[Path], _Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_embedded(spec: str) -> _Table:
    name, _, split = spec.partition(":")
    if split not in ("", *embedded.SPLITS) or spec.endswith(":"):
        raise DataError(f"{spec} has no such split; use {name}, {name}:train or {name}:test")
    if name == "pydoc":
        return {"text": embedded.pydoc_sentences(split or None)}
    images, labels = embedded.digits(split or None)
    return {"image": list(images), "label": labels.tolist()}


def _read_hub(spec: str) -> _Table:
    match = re.fullmatch(r"hf:([^:]+):(.+)", spec)
    if match is None:
        raise DataError(f"{spec} must be hf:NAME[/CONFIG]:SPLIT, as in hf:nyu-mll/glue/sst2:train")
    name, split = match.groups()
    head, _, config = name.rpartition("/")
    # ORG/NAME and NAME/CONFIG look alike: the first is the rule on the hub, so it is tried first.
    attempts: list[tuple[str, str | None]] = [(name, None)]
    if name.count("/") == 1:
        attempts.append((head, config))
    elif name.count("/") == 2 and not Path(name).exists():
        attempts = [(head, config)]
    failures = []
    for path, configuration in attempts:
        try:
            return _columns_of(datasets.load_dataset(path, configuration, split=split))
        except Exception as error:  # the hub's client raises of many families, from OSError down
            failures.append(_one_line(error))
            if isinstance(error, ConnectionError) and not datasets.config.HF_HUB_OFFLINE:
                break  # each attempt retries for half a minute
    raise DataError(
        f"{spec} cannot be opened: {failures[0]}; check the name and the connection, or use a file"
    )


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
