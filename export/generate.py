"""Text generation with a bundle, as `transformers.generate` does it: its rules, over a graph's logits.

How to choose the next token is transformers' own code (forced and suppressed tokens, penalties,
beams, sampling), which reads the `generation_config.json` that the model brings; a graph and its
cache stand where the PyTorch model would.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from calib_data.errors import ConfigError, ModelError
from compress.config import StageConfig, require
from compress.files import read_json
from compress.loading import quiet_libraries
from export.bundle import OnnxBundle
from export.decoding import CachedDecoding, Decoding, Seq2SeqDecoding

NEW_TOKENS = 128  # where neither the user nor the model says how many
_ONE_RESULT = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "cache_implementation": None,  # the graph brings its own
    "prefill_chunk_size": None,
    "use_cache": True,
}
_UNTOLD = {*_ONE_RESULT, "transformers_version", "_from_model_config"}


@dataclass(frozen=True)
class GenerateConfig(StageConfig):
    """What the user asks for; None leaves it to the model's generation_config.json."""

    max_new_tokens: int | None = None
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # sample among this many likeliest tokens; 0: all
    top_p: float | None = None  # sample among the likeliest tokens that hold this much probability
    beams: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        new, warm, top_k, top_p = self.max_new_tokens, self.temperature, self.top_k, self.top_p
        require(new is None or new > 0, "--max-new-tokens must be positive")
        require(warm is None or warm >= 0, "--temperature must not be negative")
        require(top_k is None or top_k >= 0, "--top-k must not be negative")
        require(top_p is None or 0 < top_p <= 1, "--top-p must be above 0 and at most 1")
        require(self.beams is None or self.beams > 0, "--beams must be positive")
        require(
            not ((top_k or (top_p or 1) < 1) and warm == 0),
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
        encoder, decoder = graphs["encoder_model"].path, graphs["decoder_model_merged"].path
        return Seq2SeqDecoding(encoder, decoder, provider, threads)
    if "model" in graphs and graphs["model"].signature.has_past:
        return CachedDecoding(graphs["model"].path, provider, threads)
    raise ModelError(
        f"{bundle.path} is no decoder with a cache; export one with a text generation task"
    )


def settings_of(bundle: OnnxBundle, config: GenerateConfig) -> GenerationConfig:
    """Return transformers' settings: the bundle's, and what the user asks for in place of them.

    Raises `ConfigError` for a combination that transformers does not take.
    """
    values = _own_settings(bundle)
    asked: dict[str, Any] = dict(_ONE_RESULT)
    if config.max_new_tokens is not None:
        asked["max_new_tokens"] = config.max_new_tokens
    elif values.max_new_tokens is None and values.max_length is None:
        asked["max_new_tokens"] = NEW_TOKENS
    if config.temperature is not None:
        asked["do_sample"] = config.temperature > 0
        asked["temperature"] = config.temperature or 1.0
    if config.beams is not None:
        asked["num_beams"] = config.beams
    for name in ("top_k", "top_p"):
        if (value := getattr(config, name)) is not None:
            asked[name] = value
    if values.max_new_tokens is not None or "max_new_tokens" in asked:
        asked["max_length"] = None  # the other way to say it
    values.update(**asked)
    if not values.do_sample:
        if config.top_k or (config.top_p or 1) < 1:
            raise ConfigError("--top-k and --top-p sample, which needs --temperature above 0")
        for name in ("temperature", "top_k", "top_p"):  # without sampling they are noise
            setattr(values, name, None)
    if values.guidance_scale not in (None, 1):
        raise ConfigError(
            f"{bundle.path}/generation_config.json asks for guidance_scale {values.guidance_scale}, "
            "which runs the model on a second prompt; that is not supported"
        )
    return values


def _own_settings(bundle: OnnxBundle) -> GenerationConfig:
    path = bundle.path / "generation_config.json"
    config = read_json(bundle.path / "config.json")
    try:
        values = GenerationConfig.from_dict(read_json(path) if path.is_file() else {})
    except Exception as error:  # of a file that the user may have written: no common type
        raise ModelError(f"{path} is no generation config: {error}") from error
    # what generation_config.json does not name, config.json may
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"):
        if getattr(values, name) is None:
            setattr(values, name, config.get(name))
    return values


def generate(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    progress: Callable[[], None] = lambda: None,
) -> Generation:
    """Return what `settings` make of each prompt of token ids.

    Rows of different lengths are padded, on the left for decoders. Raises `ConfigError` for an
    empty prompt, and for settings that transformers refuses.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("a prompt is empty; give at least one token")
    ends = settings.eos_token_id
    end = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    settings = copy.deepcopy(settings)
    if settings.pad_token_id is None:
        settings.pad_token_id = min(end, default=0)
    both = isinstance(decoding, Seq2SeqDecoding)
    if both and settings.decoder_start_token_id is None:
        raise ModelError("the model's config.json names no decoder_start_token_id")
    ids, mask = _padded(prompts, settings.pad_token_id, left=not both)
    model: Any = _GraphModel(decoding, both, settings, ids.shape[1], progress)
    run: Any = model.generate
    given: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
    }
    started = time.perf_counter()
    if isinstance(decoding, Seq2SeqDecoding):
        decoding.encode(ids, mask)
        model.prompt_seconds = time.perf_counter() - started
        # what was encoded stays with the decoding; transformers only counts its rows
        given["encoder_outputs"] = BaseModelOutput(last_hidden_state=torch.zeros(*ids.shape, 1))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), quiet_libraries():
        torch.manual_seed(seed)
        try:
            made = run(
                **given,
                generation_config=settings,
                past_key_values=model.cache,
                tokenizer=tokenizer if settings.stop_strings else None,
            )
        except ValueError as error:  # settings that do not go together
            raise ConfigError(f"generation_config.json: {' '.join(str(error).split())}") from error
    seconds = time.perf_counter() - started
    first = 1 if both else ids.shape[1]
    rows = tuple(_before(row[first:], end) for row in made.tolist())
    return Generation(rows, model.prompt_seconds, seconds - model.prompt_seconds, model.steps)


@dataclass
class _GraphCache:
    """What transformers asks of a cache; the keys and values are the decoding's."""

    decoding: Decoding
    length: int = 0
    is_compileable: bool = field(default=False, init=False)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Go on from other rows: beam search has dropped some and split others."""
        self.decoding.reorder(rows.numpy())


class _GraphModel(PreTrainedModel, GenerationMixin):
    """A graph where transformers expects a model."""

    config_class = PretrainedConfig

    def __init__(
        self,
        decoding: Decoding,
        encodes: bool,
        settings: GenerationConfig,
        longest: int,
        progress: Callable[[], None],
    ) -> None:
        super().__init__(PretrainedConfig(is_encoder_decoder=encodes))
        self.generation_config = GenerationConfig()
        self.decoding, self.encodes, self.progress = decoding, encodes, progress
        self.copies = settings.num_beams or 1
        self.room = settings.max_new_tokens or max((settings.max_length or 0) - longest, 1)
        self.cache = _GraphCache(decoding)
        self.prompt_seconds, self.steps = 0.0, 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutputWithPast:
        """Return the logits (batch, 1, vocabulary) after all of `input_ids` (batch, tokens)."""
        ids = input_ids.numpy()
        if self.cache.length:
            logits = self.decoding.step(ids[:, -1])
            self.steps += 1
        else:
            logits = self._start(ids, attention_mask)
        self.cache.length = ids.shape[1]
        self.progress()
        made: Any = torch.from_numpy(logits).unsqueeze(1)
        return CausalLMOutputWithPast(logits=made, past_key_values=self.cache)  # type: ignore[arg-type]

    def _start(self, ids: np.ndarray, mask: torch.Tensor | None) -> np.ndarray:
        """Run each prompt once, however many beams go on from it."""
        started = time.perf_counter()
        copies = self.copies
        first = np.ascontiguousarray(ids[::copies])
        own = np.ones_like(first) if self.encodes or mask is None else mask.numpy()[::copies]
        logits = self.decoding.start(first, np.ascontiguousarray(own), self.room)
        if copies > 1:
            rows = np.arange(len(first)).repeat(copies)
            self.decoding.reorder(rows)
            logits = logits[rows]
        self.prompt_seconds += time.perf_counter() - started
        return logits


def generate_text(
    bundle: OnnxBundle,
    texts: Sequence[str],
    config: GenerateConfig,
    provider: str = "cpu",
    threads: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[str], Generation, dict[str, Any]]:
    """Return the continuation of each text, how it was made, and the settings that made it.

    Raises `ConfigError` for a prompt that leaves no room for the new tokens, and `ModelError` for a
    bundle without a tokenizer.
    """
    tokenizer = bundle.processor
    if not callable(tokenizer):
        raise ModelError(f"{bundle.path} has no tokenizer; use export.generate with token ids")
    decoding = open_decoding(bundle, provider, threads)
    settings = settings_of(bundle, config)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    if not isinstance(decoding, Seq2SeqDecoding):
        _check_room(bundle, max(map(len, prompts)), settings)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    made = generate(
        decoding, prompts, settings, seed=config.seed, tokenizer=tokenizer, progress=progress
    )
    told = {name: value for name, value in settings.to_diff_dict().items() if name not in _UNTOLD}
    return [tokenizer.decode(row, skip_special_tokens=True) for row in made.tokens], made, told


def _check_room(bundle: OnnxBundle, longest: int, settings: GenerationConfig) -> None:
    limit = bundle.graphs["model"].signature.longest
    new = settings.max_new_tokens
    needed = longest + new if new is not None else settings.max_length
    if longest >= needed:
        raise ConfigError(
            f"the prompt is {longest} tokens and generation_config.json allows {needed} in all; pass "
            "--max-new-tokens"
        )
    if limit is not None and needed > limit:
        raise ConfigError(
            f"the prompt and {needed - longest} new tokens are {needed} tokens, more than the "
            f"model's {limit} positions; lower --max-new-tokens"
        )


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
