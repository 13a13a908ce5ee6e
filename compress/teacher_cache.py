"""A teacher that says everything once: its answers are kept on disk and looked up in later epochs.

A batch says which rows it holds (`Batches.numbered`). Rows that are not stored are computed and
written, so nothing is computed that training does not reach, and a run that was killed goes on with
what is there.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_data.batches import ROWS, TEACHER, Batches, model_inputs
from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import Checkpoint, weights_sha256
from compress.layer_map import EMBEDDINGS
from compress.loss_table import LOSSES
from compress.matching import DISTRIBUTION, LAYERS, LOGITS, MAPS, RELATIONS, SAME_VECTOR, VECTOR
from compress.observe import QKV, Observed, Observer
from compress.pairing import Pairing
from compress.row_store import Layout, RowStore, checksum
from compress.versions import versions

_MASK = "attention_mask"
_QKV = ("query", "key", "value")
_CHANGED = (
    "row {} of the data has other inputs than before, as with random masking, so the teacher's answer "
    "cannot be looked up; do without --cache-teacher"
)


@dataclass(frozen=True)
class Kept:
    """What of an observation is stored, by name or layer; the rest is empty when looked up.

    Of attention: query, key and value, as the relation losses need them, not mask and bias, whose
    size is the square of the length.
    """

    outputs: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    embeddings: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def flatten(self, seen: Observed) -> dict[str, Tensor]:
        """Return what is kept of `seen` by one name each."""
        found = {f"outputs.{name}": seen.outputs[name] for name in self.outputs}
        found |= {f"layers.{i}": seen.layers[i] for i in self.layers}
        found |= {f"embeddings.{i}": seen.embeddings[i] for i in self.embeddings}
        for i in self.attention:
            qkv = seen.attention[i]
            found |= {f"attention.{i}.{part}": getattr(qkv, part) for part in _QKV}
        return found

    def restore(self, flat: Mapping[str, Tensor]) -> Observed:
        """Return the observation that `flat` was made of."""
        nothing = torch.empty(0)

        def listed(kind: str, kept: tuple[int, ...]) -> list[Tensor]:
            return [flat.get(f"{kind}.{i}", nothing) for i in range(max(kept, default=-1) + 1)]

        attention = [QKV(nothing, nothing, nothing)] * (max(self.attention, default=-1) + 1)
        for i in self.attention:
            attention[i] = QKV(**{part: flat[f"attention.{i}.{part}"] for part in _QKV})  # type: ignore[arg-type]
        return Observed(
            outputs={name: flat[f"outputs.{name}"] for name in self.outputs},
            layers=listed("layers", self.layers),
            embeddings=listed("embeddings", self.embeddings),
            attention=attention,
        )


def kept_for(pairing: Pairing) -> Kept:
    """Return what the losses of `pairing` look at of the teacher.

    Raises `ConfigError` for attention maps: what they need grows with the square of the length.
    """
    kinds = {LOSSES[name].kind for name in pairing.weights}
    if MAPS in kinds:
        raise ConfigError(
            "the loss 'attention' needs the teacher's maps, token by token, which would fill the disk; "
            "use relations, or do without --cache-teacher"
        )
    setup = pairing.setup
    outputs = {"logits"} if kinds & {LOGITS, DISTRIBUTION} else set()
    outputs |= {setup.output} if kinds & {VECTOR, SAME_VECTOR} else set()
    layers = {theirs for _, theirs in setup.pairs} if LAYERS in kinds else set()
    attention = {theirs for _, theirs in setup.relation_pairs} if RELATIONS in kinds else set()
    return Kept(
        outputs=tuple(sorted(outputs)),
        layers=tuple(sorted(layers - {EMBEDDINGS})),
        embeddings=(0,) if EMBEDDINGS in layers else (),
        attention=tuple(sorted(attention)),
    )


class TeacherCache:
    """An `Observer` that asks another one about each row once, and remembers.

    What it returns is float32, what the teacher says to rounding: a row was computed in the batch in
    which it was first met, with other padding. Padding itself is 0. What is computed is always
    read back, so that a run that is continued sees what one that was not interrupted does.

    `settings` are what the answers depend on beside teacher, data and versions, such as the
    precision they are computed in; a cache of others in `folder` is replaced. `reached` is the share
    of the rows that training gets to.

    The first call opens the folder; it raises `DestinationError` where the disk has no room. Raises
    `ModelError` for an encoder–decoder or batches that are not numbered, `ConfigError` where a row
    is not given the same inputs in every epoch.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        observer: Observer,
        batches: Batches,
        kept: Kept,
        folder: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        reached: float = 1.0,
    ) -> None:
        if not batches.steady():
            raise ConfigError(
                "the data is masked anew in every epoch, so there is no answer of the teacher to look "
                "up; do without --cache-teacher"
            )
        if getattr(teacher.config, "is_encoder_decoder", False):
            raise ModelError(
                "an encoder–decoder's answers have the length of their targets, which is not known "
                "before; do without --cache-teacher"
            )
        self._teacher, self._observer, self._kept = teacher, observer, kept
        self._lengths = np.asarray(batches.lengths, dtype=np.int64)
        self._folder, self._reached = folder, reached
        self._key = _key(teacher, batches, kept, settings or {})
        self._axes: dict[str, int | None] = {}
        self._store: RowStore | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Observed:
        """Return what the teacher says about `batch`, on the batch's device."""
        if ROWS not in batch:
            raise ModelError("the batch does not say which rows it holds; use Batches.numbered()")
        if self._store is None:
            self._store = self._open(batch)
        store, places = self._store, self._places(batch)
        known = [store.has(place.row, place.given) for place in places]
        if None in known:
            raise ConfigError(_CHANGED.format(places[known.index(None)].row))
        if not all(known):
            self._fill(store, batch, places)
        return self._kept.restore(self._load(store, batch, places))

    def _open(self, batch: Mapping[str, Tensor]) -> RowStore:
        """Return the store, its layouts found by asking about samples of two lengths."""
        device = batch[ROWS].device
        shapes = []
        for length in (4, 5):
            sample = self._teacher.signature.sample(batch=2, sequence=length)
            sample = {name: value.to(device) for name, value in sample.items()}
            shapes.append({k: tuple(v.shape) for k, v in self._ask(sample).items()})
        layouts = {}
        for name, (short, long) in ((k, (shapes[0][k], shapes[1][k])) for k in shapes[0]):
            axes = [axis for axis, (a, b) in enumerate(zip(short, long)) if a != b]
            if len(axes) > 1 or short[0] != 2:
                raise ModelError(f"{name} of the teacher is no value per row or token: {short}")
            self._axes[name] = axes[0] if axes else None
            layouts[name] = Layout(
                tuple(size for axis, size in enumerate(short) if axis not in (0, *axes)), bool(axes)
            )
        return RowStore(self._folder, self._key, layouts, self._lengths, self._reached)

    def _ask(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._kept.flatten(self._observer(batch))

    def _places(self, batch: Mapping[str, Tensor]) -> list["_Place"]:
        inputs = {k: v.cpu().numpy() for k, v in sorted(model_inputs(batch).items())}
        seen = {
            k.removesuffix(_MASK): v.astype(bool) for k, v in inputs.items() if k.endswith(_MASK)
        }
        places = []
        for i, row in enumerate(batch[ROWS].tolist()):
            length = int(self._lengths[row])
            start = int(seen[""][i].argmax()) if "" in seen else 0
            tokens = slice(start, start + length)
            if "" in seen and not seen[""][i].sum() == seen[""][i, tokens].sum() == length:
                raise ConfigError(_CHANGED.format(row))
            # without padding, which differs from batch to batch
            given = checksum(
                value[i][seen[prefix][i]] if (prefix := _prefix(name)) in seen and value.ndim == 2
                else value[i]
                for name, value in inputs.items()
            )  # fmt: skip
            places.append(_Place(i, row, tokens, given))
        return places

    def _fill(self, store: RowStore, batch: Mapping[str, Tensor], places: list["_Place"]) -> None:
        answers = {
            name: (value if axis is None else value.movedim(axis, 1)).float().cpu().numpy()
            for (name, value), axis in zip(self._ask(batch).items(), self._axes.values())
        }
        for place in places:
            if not store.has(place.row, place.given):
                parts = {
                    name: value[place.index : place.index + 1]
                    if self._axes[name] is None
                    else value[place.index, place.tokens]
                    for name, value in answers.items()
                }
                store.write(place.row, place.given, parts)

    def _load(
        self, store: RowStore, batch: Mapping[str, Tensor], places: list["_Place"]
    ) -> dict[str, Tensor]:
        rows = [store.read(place.row) for place in places]
        found = {}
        for name, axis in self._axes.items():
            first = rows[0][name]
            if axis is None:
                made = np.concatenate([row[name] for row in rows])
            else:
                longest = batch["input_ids"].shape[1]
                made = np.zeros((len(rows), longest, *first.shape[1:]), dtype=np.float32)
                for place, row in zip(places, rows):
                    made[place.index, place.tokens] = row[name]
            value = torch.from_numpy(made).to(batch[ROWS].device)
            found[name] = value if axis is None else value.movedim(1, axis)
        return found


def _prefix(name: str) -> str:
    """Return how the name of an input begins that is for a teacher with a tokenizer of its own."""
    return TEACHER if name.startswith(TEACHER) else ""


@dataclass(frozen=True)
class _Place:
    """A row's place in a batch, where its tokens are, and the checksum of what the teacher is given."""

    index: int
    row: int
    tokens: slice
    given: int


def _key(teacher: Checkpoint, batches: Batches, kept: Kept, settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all that the answers depend on."""
    config = teacher.config.to_dict() if teacher.config is not None else {}
    content = {
        "teacher": weights_sha256(teacher.module),
        "config": config,
        "sidecars": {
            name: hashlib.sha256(file).hexdigest() for name, file in teacher.sidecars.items()
        },
        "structure": dict(teacher.structure),
        "data": batches.fingerprint,
        "kept": asdict(kept),
        "settings": dict(settings),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
