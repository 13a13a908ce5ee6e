"""Text generation with a bundle: greedy or sampled, a batch of prompts at a time."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib_data.errors import ConfigError, ModelError
from compress.config import StageConfig, require
from export.bundle import OnnxBundle
from export.decoding import CachedDecoding, Decoding, Seq2SeqDecoding


@dataclass(frozen=True)
class GenerateConfig(StageConfig):
    """How to generate."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this much probability
    ignore_end: bool = False  # go on after the end token, for measuring
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "--max-new-tokens must be positive")
        require(self.temperature >= 0, "--temperature must not be negative")
        require(self.top_k >= 0, "--top-k must not be negative")
        require(0 < self.top_p <= 1, "--top-p must be above 0 and at most 1")
        sampling = self.top_k or self.top_p < 1
        require(
            not (sampling and self.temperature == 0),
            "--top-k and --top-p sample, which needs --temperature above 0",
        )


@dataclass(frozen=True)
class Generation:
    """What was generated: token ids per prompt, the end token left out, and how long it took."""

    tokens: tuple[tuple[int, ...], ...]
    prompt_seconds: float
    step_seconds: float
    steps: int  # calls after the prompt

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second, the prompt's time included."""
        count = (self.steps + 1) * len(self.tokens)
        return count / (self.prompt_seconds + self.step_seconds)


def open_decoding(
    bundle: OnnxBundle, provider: str = "cpu", threads: int | None = None
) -> Decoding:
    """Return a bundle's decoder, ready for `generate`.

    Raises `ModelError` for a bundle that is no decoder with a cache.
    """
    graphs = bundle.graphs
    if "decoder_model_merged" in graphs:
        start = _setting(bundle, "decoder_start_token_id")
        if start is None:
            raise ModelError(f"{bundle.path}/config.json names no decoder_start_token_id")
        encoder, decoder = graphs["encoder_model"].path, graphs["decoder_model_merged"].path
        return Seq2SeqDecoding(encoder, decoder, int(start), provider, threads)
    if "model" in graphs and graphs["model"].signature.has_past:
        return CachedDecoding(graphs["model"].path, provider, threads)
    raise ModelError(
        f"{bundle.path} is no decoder with a cache; export one with a text generation task"
    )


def generate(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    end: frozenset[int] = frozenset(),
    pad: int = 0,
    left: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> Generation:
    """Return the continuation of each prompt, up to an `end` token or `max_new_tokens`.

    Rows of different lengths are padded, on the left for decoders. Raises `ConfigError` for an
    empty prompt.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("a prompt is empty; give at least one token")
    ids, mask = _padded(prompts, pad, left)
    random = np.random.default_rng(config.seed)
    started = time.perf_counter()
    logits = decoding.start(ids, mask, config.max_new_tokens)
    prompted = time.perf_counter()
    stop = frozenset() if config.ignore_end else end
    made: list[np.ndarray] = []
    done = np.zeros(len(prompts), bool)
    while True:
        token = np.where(done, pad, choose(logits, config, random))
        done |= np.isin(token, list(stop))
        made.append(token)
        progress()
        if done.all() or len(made) == config.max_new_tokens:
            break
        logits = decoding.step(token)
    finished = time.perf_counter()
    rows = np.stack(made, axis=1)
    kept = tuple(_before(row, stop) for row in rows.tolist())
    return Generation(kept, prompted - started, finished - prompted, len(made) - 1)


def choose(logits: np.ndarray, config: GenerateConfig, random: np.random.Generator) -> np.ndarray:
    """Return one token per row of logits (batch, vocabulary): the likeliest, or a sample."""
    if config.temperature == 0:
        picked: np.ndarray = logits.argmax(axis=1)
        return picked
    scaled = logits.astype(np.float64) / config.temperature
    order = np.argsort(-scaled, axis=1)
    ranked = np.take_along_axis(scaled, order, axis=1)
    likely = np.exp(ranked - ranked[:, :1])
    likely /= likely.sum(axis=1, keepdims=True)
    if config.top_k:
        likely[:, config.top_k :] = 0
    if config.top_p < 1:
        before = likely.cumsum(axis=1) - likely  # the token that crosses the bound stays
        likely[before >= config.top_p] = 0
    bounds = likely.cumsum(axis=1)
    ranks = (bounds < random.random((len(logits), 1)) * bounds[:, -1:]).sum(axis=1)
    drawn: np.ndarray = np.take_along_axis(order, ranks[:, None], axis=1)[:, 0]
    return drawn


def generate_text(
    bundle: OnnxBundle,
    texts: Sequence[str],
    config: GenerateConfig,
    provider: str = "cpu",
    threads: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[str], Generation]:
    """Return the continuation of each text and how it was made.

    Raises `ConfigError` for a prompt that leaves no room for the new tokens, and `ModelError` for a
    bundle without a tokenizer.
    """
    tokenizer = bundle.processor
    if not callable(tokenizer):
        raise ModelError(f"{bundle.path} has no tokenizer; use export.generate with token ids")
    decoding = open_decoding(bundle, provider, threads)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    both = isinstance(decoding, Seq2SeqDecoding)
    longest = None if both else bundle.graphs["model"].signature.longest
    needed = max(map(len, prompts)) + config.max_new_tokens
    if longest is not None and needed > longest:
        raise ConfigError(
            f"the prompt and {config.max_new_tokens} new tokens are {needed} tokens, more than the "
            f"model's {longest} positions; lower --max-new-tokens"
        )
    ends = _setting(bundle, "eos_token_id")
    end = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end, default=0)
    made = generate(decoding, prompts, config, end=end, pad=pad, left=not both, progress=progress)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in made.tokens], made


def _setting(bundle: OnnxBundle, name: str) -> Any:
    """Return a token id from generation_config.json or config.json, or None."""
    for file in ("generation_config.json", "config.json"):
        path = bundle.path / file
        if path.is_file():
            value = json.loads(path.read_text()).get(name)
            if value is not None:
                return value
    return None


def _padded(
    prompts: Sequence[Sequence[int]], pad: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask (batch, longest) of prompts padded on one side."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def _before(row: list[int], stop: frozenset[int]) -> tuple[int, ...]:
    cut = next((i for i, token in enumerate(row) if token in stop), len(row))
    return tuple(row[:cut])
