"""Reading what a spec names, whatever it is, as whole columns."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from calib_data import embedded
from calib_data.errors import DataError

SUPPORTED = (
    "files ending in .jsonl, .json (one object per line), .csv, .tsv, .parquet, .txt, .text or a "
    "language such as .en (one text per line), .npz (images), two files of lines as in "
    "train.de+train.en, whole:FILE[:train|:test], hf:NAME[/CONFIG]:SPLIT, pydoc[:train|:test], "
    "digits[:train|:test]; several joined by commas, each as often as N*SPEC says"
)
TRAIN_SHARE = 0.9  # of the characters of whole:FILE:train; whole:FILE:test has the rest
_BUILT_IN = re.compile(r"(pydoc|docstrings|digits)(:|$)")
_TIMES = re.compile(r"(\d+)([*~])(.+)")
_NPZ = re.compile(r"(.+\.npz)(?::(\w+))?")
_WHOLE = re.compile(r"whole:(.+?)(?::(train|test))?")
# names of arrays in an .npz file, each followed by _SPLIT if there are several
_NPZ_ROLES = {"image": ("x", "image", "images", "pixels"), "label": ("y", "label", "labels")}
# Every reader returns whole columns by name; a column is anything with a length and an index.
Table = dict[str, Sequence[Any]]


class _Column(Sequence[Any]):
    """A column of a `datasets.Dataset`, read when indexed, with its class names if it has any."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self.values = dataset[name]
        self.names = getattr(dataset.features[name], "names", None)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]


def _columns_of(dataset: datasets.Dataset) -> Table:
    return {name: _Column(dataset, name) for name in dataset.column_names}


def read_table(spec: str, positions: list[str]) -> Table:
    """Return the columns of what `spec` names; `positions` are those of a file without a header."""
    if spec.startswith("hf:"):
        return _read_hub(spec)
    if _BUILT_IN.match(spec):
        return _read_embedded(spec)
    if whole := _WHOLE.fullmatch(spec):
        return {"text": [_read_whole(*whole.groups())]}
    if npz := _NPZ.fullmatch(spec):
        return _read_npz(Path(npz[1]), npz[2])
    if "+" in spec and not Path(spec).is_file():
        return _read_aligned(spec)
    return _read_file(spec, positions)


@dataclass(frozen=True)
class Part:
    """One of the sources that a spec joins, and how often each of its texts is taken."""

    spec: str
    times: int = 1
    varied: bool = False  # altered from the second time on


def parts_of(spec: str) -> list[Part]:
    """Return the sources that `spec` joins by commas; one, taken once, unless it says otherwise."""
    if Path(spec).is_file():
        return [Part(spec)]
    found = []
    for part in map(str.strip, spec.split(",")):
        counted = None if Path(part).is_file() else _TIMES.fullmatch(part)
        taken = Part(counted[3], int(counted[1]), counted[2] == "~") if counted else Part(part)
        found.append(taken)
    return found


def data_files(spec: str) -> list[Path]:
    """Return the files that `spec` reads; none for data that is built in or on the hub."""
    paths = [path for part in parts_of(spec) for path in _named_files(part.spec)]
    return paths if all(path.is_file() for path in paths) else []


def require_files(spec: str) -> None:
    """Raise `DataError` unless `spec` is of a known kind and its files are there; open none."""
    for part in parts_of(spec):
        for path in _named_files(part.spec):
            if not _WHOLE.fullmatch(part.spec) and not _NPZ.fullmatch(part.spec):
                _kind_of(path)
            _require_file(path)


def _named_files(spec: str) -> list[Path]:
    """Return the files that one source names, there or not."""
    if spec.startswith("hf:") or _BUILT_IN.match(spec):
        return []
    if whole := _WHOLE.fullmatch(spec):
        return [Path(whole[1])]
    if npz := _NPZ.fullmatch(spec):
        return [Path(npz[1])]
    return [Path(spec)] if Path(spec).is_file() else [Path(part) for part in spec.split("+")]


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is not a file; check the path (now in {Path.cwd()})")


def _kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read; "" for lines of text."""
    suffix = path.suffix.lower()
    if suffix in (".text", ".txt") or re.fullmatch(r"\.[a-z]{2}", suffix):
        return ""
    if suffix not in {**_READERS, **TABLES}:
        raise DataError(f"{path} is no data set I can open; I open {SUPPORTED}")
    return suffix


def _read_aligned(spec: str) -> Table:
    """Return two files of lines as pairs: row by row, the first's texts and the second's."""
    parts = spec.split("+")
    if len(parts) != 2:
        raise DataError(f"{spec} joins {len(parts)} files; name two, as in train.de+train.en")
    columns = []
    for part in parts:
        if Path(part).suffix.lower() in {**TABLES, **_READERS}:
            raise DataError(f"{part} is no file of lines; only these can be joined with +")
        columns.append(_read_file(part, [])["text"])
    if len(columns[0]) != len(columns[1]):
        counts = " and ".join(str(len(column)) for column in columns)
        raise DataError(f"{spec} has {counts} lines; pairs need as many in both files")
    return {"text": columns[0], "text_pair": columns[1]}


def _read_whole(name: str, split: str | None) -> str:
    """Return a file as one text, or its first 90 % (train) or the rest (test) in characters."""
    path = Path(name)
    _require_file(path)
    text = _decode(path)
    cut = int(TRAIN_SHARE * len(text))
    return {"train": text[:cut], "test": text[cut:], None: text}[split]


def _read_npz(path: Path, split: str | None) -> Table:
    """Return the images and labels of one split: arrays `x_SPLIT` and `y_SPLIT`, or `x` and `y`."""
    _require_file(path)
    try:
        # Never unpickled: an array of objects raises ValueError.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {_one_line(error)}") from error
    found: dict[str, Table] = {}
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


def _read_file(spec: str, positions: list[str]) -> Table:
    path = Path(spec)
    suffix = _kind_of(path)
    _require_file(path)
    try:
        if suffix in TABLES:
            return _with_header(TABLES[suffix](path), positions, spec)
        return _READERS[suffix](path) if suffix else {"text": _lines(path)}
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are of these families
        raise DataError(f"{spec} cannot be read as {path.suffix}: {_one_line(error)}") from error


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


def _with_header(rows: list[list[str]], positions: list[str], spec: str) -> Table:
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


def _read_jsonl(path: Path) -> Table:
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


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    return _columns_of(datasets.Dataset(pyarrow.parquet.read_table(path)))


TABLES: dict[str, Callable[[Path], list[list[str]]]] = {".csv": _read_csv, ".tsv": _read_tsv}
_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_embedded(spec: str) -> Table:
    name, _, split = spec.partition(":")
    if split not in ("", *embedded.SPLITS) or spec.endswith(":"):
        raise DataError(f"{spec} has no such split; use {name}, {name}:train or {name}:test")
    if name != "digits":
        read = embedded.pydoc_sentences if name == "pydoc" else embedded.docstrings
        return {"text": read(split or None)}
    images, labels = embedded.digits(split or None)
    return {"image": list(images), "label": labels.tolist()}


def _read_hub(spec: str) -> Table:
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
