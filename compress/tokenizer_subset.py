"""A tokenizer that knows fewer tokens and still splits what it was made for as before.

What is rewritten is `tokenizer.json` of the library `tokenizers`, for each of its models. That texts
made of the tokens that stay are split the same follows from how a model splits. WordPiece takes the
longest piece it knows and Unigram the likeliest split: without pieces that were not chosen the choice
is the same. BPE joins pairs in the order of its merges, so a token needs those that make it, and the
tokens on the way.
"""

import copy
import itertools
import json
import re
import string
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib_data.errors import ModelError
from compress.files import read_json, write_json
from compress.loading import open_processor

_AT_ONCE = 1000  # texts
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # what Unigram and BPE write an unknown character with
_KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MODELS = ("WordPiece", "BPE", "Unigram", "WordLevel")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer whose vocabulary cannot be rewritten."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        raise ModelError(
            "the model comes without a tokenizer of its own, so no token can be told to be unused"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which is what is rewritten; convert "
            "it to a fast tokenizer first"
        )
    kind = _model(_as_json(tokenizer))["type"]
    if kind not in _MODELS:
        raise ModelError(f"a vocabulary of {', '.join(_MODELS)} can be pruned, not of {kind}")


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[list[int]]]:
    """Yield the ids of the texts, special tokens among them, some texts at a time; nothing is cut."""
    for chunk in _chunks(texts):
        yield tokenizer(chunk, truncation=False, padding=False, verbose=False)["input_ids"]


def closed(tokenizer: Any, ids: Collection[int]) -> list[int]:
    """Return `ids` and those that must stay with them, ascending.

    That are special and added tokens, and what BPE's merges need. With them stay the single characters
    that occur in tokens that stay, and ASCII and bytes: words that are not known whole are made of them.
    Of whole words (WordLevel) no characters are kept.
    """
    data = _as_json(tokenizer)
    model = _model(data)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    kept = {*ids, *tokenizer.all_special_ids, *(t["id"] for t in data["added_tokens"])}
    if model.get("unk_token") in vocabulary:
        kept.add(vocabulary[model["unk_token"]])
    if model.get("unk_id") is not None:
        kept.add(int(model["unk_id"]))
    if model["type"] != "WordLevel":
        kept |= _characters(vocabulary, kept, model, bytes_alone="ByteLevel" in json.dumps(data))
    if model["type"] == "BPE":
        named = {place: token for token, place in vocabulary.items()}
        kept |= {
            vocabulary[part]
            for token in [named[place] for place in kept if place in named]
            for part in _derivation(token, _ranks(model), model)
            if part in vocabulary
        }
    return sorted(kept & set(vocabulary.values()))


def subset(tokenizer: Any, kept: Sequence[int]) -> Any:
    """Return a tokenizer that knows only the tokens `kept` (ascending, closed), numbered from 0.

    It is written and opened again, so it is what others will open. Raises `ModelError` where its ids
    are not those asked for.
    """
    places = {old: new for new, old in enumerate(kept)}
    vocabulary = tokenizer.get_vocab()
    expected = {token: places[old] for token, old in vocabulary.items() if old in places}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save_pretrained(directory)
        for path in directory.iterdir():  # older forms of the same vocabulary
            if path.is_file() and path.name not in _KEPT_FILES and path.suffix != ".jinja":
                path.unlink()
        write_json(directory / "tokenizer.json", _renumbered(_as_json(tokenizer), places, expected))
        settings = read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" in settings:
            added = settings["added_tokens_decoder"].items()
            settings["added_tokens_decoder"] = {str(places[int(k)]): v for k, v in added}
        write_json(directory / "tokenizer_config.json", settings)
        made = open_processor(directory, text=True, images=False)
    made.model_max_length = tokenizer.model_max_length
    made.name_or_path = tokenizer.name_or_path
    if made.get_vocab() != expected:
        wrong = sorted(set(made.get_vocab().items()) ^ set(expected.items()))
        raise ModelError(
            f"{type(tokenizer).__name__} does not take a smaller vocabulary: its token "
            f"{wrong[0][0]!r} has another id than it should; leave the vocabulary whole"
        )
    return made


@dataclass(frozen=True)
class WordPieces:
    """What a tokenizer makes of words, each counted as often as it occurs."""

    unknown: float  # share of the words of which some part is not known
    pieces: float  # tokens for each word


def word_pieces(tokenizer: Any, texts: Iterable[str]) -> WordPieces:
    """Return what the tokenizer makes of the words in `texts`: what it splits them into at first."""
    unknown = words = pieces = 0
    for chunk in _chunks(texts):
        encoded = tokenizer(chunk, add_special_tokens=False, truncation=False, verbose=False)
        for encoding in encoded.encodings:
            placed = [(w, i) for w, i in zip(encoding.word_ids, encoding.ids) if w is not None]
            words += len({word for word, _ in placed})
            unknown += len({word for word, token in placed if token == tokenizer.unk_token_id})
            pieces += len(placed)
    return WordPieces(unknown / max(words, 1), pieces / max(words, 1))


# --- tokenizer.json -----------------------------------------------------------------------------


def _as_json(tokenizer: Any) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def _model(data: Mapping[str, Any]) -> dict[str, Any]:
    return dict(data["model"])


def _renumbered(
    data: dict[str, Any], places: Mapping[int, int], expected: Mapping[str, int]
) -> dict[str, Any]:
    """Return `tokenizer.json` with the tokens in `places` alone, old id → new."""
    data = copy.deepcopy(data)
    model = data["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in places]
        if model.get("unk_id") is not None:
            model["unk_id"] = places[model["unk_id"]]
    else:
        model["vocab"] = {t: places[old] for t, old in model["vocab"].items() if old in places}
    if model["type"] == "BPE":
        model["merges"] = [
            pair
            for pair in model["merges"]
            if {*_pair(pair), _joined(*_pair(pair), model)} <= model["vocab"].keys()
        ]
    data["added_tokens"] = [{**t, "id": places[t["id"]]} for t in data["added_tokens"]]
    if data.get("padding"):
        data["padding"]["pad_id"] = places[data["padding"]["pad_id"]]
    data["post_processor"] = _renumbered_processor(data.get("post_processor"), expected)
    return data


def _renumbered_processor(value: Any, expected: Mapping[str, int]) -> Any:
    """Return a post-processor with the new ids of the tokens that it puts around a text."""
    if isinstance(value, list):
        return [_renumbered_processor(entry, expected) for entry in value]
    if not isinstance(value, dict):
        return value
    made = {key: _renumbered_processor(entry, expected) for key, entry in value.items()}
    if "ids" in value and "tokens" in value:
        made["ids"] = [expected[token] for token in value["tokens"]]
    for key in ("sep", "cls"):  # BertProcessing and RobertaProcessing: [token, id]
        if isinstance(value.get(key), list):
            made[key] = [value[key][0], expected[value[key][0]]]
    return made


# --- tokens -------------------------------------------------------------------------------------


def _characters(
    vocabulary: Mapping[str, int],
    kept: Collection[int],
    model: Mapping[str, Any],
    bytes_alone: bool,
) -> set[int]:
    """Return the single characters and bytes that words may be made of."""
    alphabet = set(string.printable)
    for token, place in vocabulary.items():
        if place in kept:
            alphabet |= set(token)
    found = set()
    for token, place in vocabulary.items():
        bare = token.removeprefix(model.get("continuing_subword_prefix") or "")
        bare = bare.removesuffix(model.get("end_of_word_suffix") or "").removeprefix("▁")
        known = bare in alphabet or (bytes_alone and len(bare) == 1)  # then each is a byte
        if (len(bare) <= 1 and (not bare or known)) or _BYTE.fullmatch(token):
            found.add(place)
    return found


def _pair(merge: Any) -> tuple[str, str]:
    """Return the two parts of a merge, which older files write with a space between them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _joined(first: str, second: str, model: Mapping[str, Any]) -> str:
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _ranks(model: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Return each merge's place, made once."""
    if "ranks" not in model:
        model["ranks"] = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    ranks: dict[tuple[str, str], int] = model["ranks"]
    return ranks


def _derivation(
    token: str, ranks: Mapping[tuple[str, str], int], model: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the tokens that BPE goes through to make `token`; other words do not change its way."""
    suffix, prefix = (
        model.get(k) or "" for k in ("end_of_word_suffix", "continuing_subword_prefix")
    )
    start = prefix if prefix and token.startswith(prefix) else ""
    bare = token.removeprefix(start)
    ended = bool(suffix) and bare.endswith(suffix) and bare != suffix
    parts = list(bare.removesuffix(suffix) if ended else bare)
    parts = [(prefix if i else start) + part for i, part in enumerate(parts)]
    if ended:
        parts[-1] += suffix
    yield from parts
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[best] not in ranks:
            return  # no text comes to be split so
        parts[best : best + 2] = [_joined(*pairs[best], model)]
        yield parts[best]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == _AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
