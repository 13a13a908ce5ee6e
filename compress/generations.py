"""Data that a teacher writes: its own continuations of prompts, for distillation on sequences.

A student trained on what its teacher says meets the teacher's mode instead of the data's (Kim and
Rush 2016, arXiv:1606.07947). The result is a JSON-lines file like any other data, on which the usual
losses work.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib_data.errors import DataError, ModelError
from calib_data.sources import Examples, open_data
from compress.checkpoint import Checkpoint, weights_sha256
from compress.config import StageConfig, require
from compress.files import destination_errors
from compress.versions import versions


@dataclass(frozen=True)
class GenerateConfig(StageConfig):
    """How a teacher continues its prompts."""

    new_tokens: int = 64  # at most; its end token ends it earlier
    prompt_tokens: int = 16  # of each text, for a decoder; an encoder–decoder reads whole texts
    temperature: float = 0.0  # 0: always the likeliest token; above: sampled
    batch_size: int = 32
    max_length: int | None = 128  # tokens of a text that an encoder–decoder reads
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.new_tokens >= 1, f"--generate must be at least 1 token, got {self.new_tokens}")
        require(
            self.prompt_tokens >= 1, f"--prompt-tokens must be at least 1, got {self.prompt_tokens}"
        )
        require(
            0 <= self.temperature < float("inf"),
            f"--generate-temperature must be at least 0, got {self.temperature}",
        )


def generate_examples(
    teacher: Checkpoint,
    examples: Examples,
    config: GenerateConfig,
    directory: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Examples:
    """Return `examples` with the teacher's own words: a text, or for an encoder–decoder a pair.

    A decoder's texts are the first tokens of the originals, continued; an encoder–decoder's
    `text_pair` is its answer to `text`. They are kept in `directory`, one file per teacher, texts and
    settings: an interrupted run goes on where it was, a repeated one generates nothing.

    Raises `ModelError` for a teacher that does not generate, `DataError` for texts without a token or
    answers that are all empty, `DestinationError` where the file cannot be written.
    """
    pairs = bool(getattr(teacher.config, "is_encoder_decoder", False))
    if not hasattr(teacher.backbone, "generate") or teacher.task not in _GENERATING:
        raise ModelError(
            f"a model for {teacher.task} generates no text; --generate is for "
            f"{' and '.join(_GENERATING)}"
        )
    texts = examples.column("text")
    path = directory / f"generations-{_key(teacher, texts, config)[:16]}.jsonl"
    if not path.is_file():
        with destination_errors(path):
            directory.mkdir(parents=True, exist_ok=True)
            _write(path, _batches(teacher, texts, config, pairs), teacher, config, progress)
    return open_data(str(path))


_GENERATING = ("text-generation", "text2text-generation")


@dataclass(frozen=True)
class _Prompts:
    """A batch: the ids (B, T) that the teacher is given, their mask, and the texts they come from."""

    ids: Tensor
    mask: Tensor
    texts: list[str]
    room: int  # positions that are left for new tokens
    pairs: bool  # whether the answer stands alone, beside the text


def _key(teacher: Checkpoint, texts: list[str], config: GenerateConfig) -> str:
    settings = [weights_sha256(teacher.backbone), config.to_json(), versions()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _batches(
    teacher: Checkpoint, texts: list[str], config: GenerateConfig, pairs: bool
) -> list[_Prompts]:
    """Return the prompts in batches of like length, decoders' padded on the left."""
    tokenizer = teacher.processor
    longest = teacher.max_length or 10**9
    most = config.max_length or longest if pairs else config.prompt_tokens
    most = min(most, longest if pairs else longest - 1)
    # a decoder's prompt is cut after its end token is gone, which stands where a text ends
    encoded = tokenizer(texts, truncation=pairs, max_length=most if pairs else None)["input_ids"]
    rows = encoded if pairs else [_unended(row, tokenizer)[:most] for row in encoded]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise DataError(f"text {empty[0] + 1} has no token to begin with; remove it")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # stable: the same every time
    made = []
    for start in range(0, len(order), config.batch_size):
        chosen = order[start : start + config.batch_size]
        ids, mask = _padded([rows[i] for i in chosen], tokenizer.pad_token_id or 0, not pairs)
        room = longest if pairs else longest - ids.shape[1]
        made.append(_Prompts(ids, mask, [texts[i] for i in chosen], room, pairs))
    return made


def _unended(row: list[int], tokenizer: Any) -> list[int]:
    """Return the ids without an end token last, after which nothing would follow."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return row[:-1] if row and row[-1] in ends else row


def _padded(rows: list[list[int]], fill: int, left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return ids, mask


def _write(
    path: Path,
    batches: list[_Prompts],
    teacher: Checkpoint,
    config: GenerateConfig,
    progress: Callable[[str, int, int], None],
) -> None:
    """Write a line per text; the file takes its name when it is whole, and goes on before that."""
    partial = path.with_suffix(".partial")
    kept, done = _whole_batches(partial, batches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.module.to(device)
    try:
        with partial.open("r+b" if partial.is_file() else "w+b") as file:
            file.truncate(kept)
            file.seek(kept)
            for index in range(done, len(batches)):
                progress("generate", index, len(batches))
                for row in _answers(teacher, batches[index], config, index, device):
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
    finally:
        teacher.module.cpu()
    partial.replace(path)


def _whole_batches(partial: Path, batches: list[_Prompts]) -> tuple[int, int]:
    """Return how many bytes of `partial` hold whole batches, and how many batches these are."""
    lines = partial.read_bytes().split(b"\n")[:-1] if partial.is_file() else []
    done = rows = 0
    while done < len(batches) and rows + len(batches[done].texts) <= len(lines):
        rows += len(batches[done].texts)
        done += 1
    return sum(len(line) + 1 for line in lines[:rows]), done


def _answers(
    teacher: Checkpoint, prompts: _Prompts, config: GenerateConfig, index: int, device: torch.device
) -> Iterator[dict[str, str]]:
    """Yield a row per prompt; what is drawn depends on the seed and the batch's place alone."""
    tokenizer, backbone = teacher.processor, teacher.backbone
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature:  # top_k 0: from all of the teacher's distribution
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed * 1_000_003 + index)
        made: Tensor = backbone.generate(  # type: ignore[operator]
            prompts.ids.to(device),
            attention_mask=prompts.mask.to(device),
            max_new_tokens=min(config.new_tokens, prompts.room),
            pad_token_id=tokenizer.pad_token_id or 0,
            **sampling,
        ).cpu()
    for text, mask, row in zip(prompts.texts, prompts.mask, made):
        if prompts.pairs:
            yield {"text": text, "text_pair": tokenizer.decode(row, skip_special_tokens=True)}
        else:
            row = row[int((mask == 0).sum()) :]  # without the padding on the left
            yield {"text": tokenizer.decode(row, skip_special_tokens=True)}
