"""The modules after the transformer of a sentence encoder: a closed list, no import by a file's word.

Each takes the dict of features and gives it back changed, as in sentence-transformers. The plainest
are ours and need nothing installed; every other is the library's own object (`pip install
'onnxpress[sentence]'`), so that what is traced is what users run.
"""

import importlib
import importlib.util
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib_data.errors import ModelError

Features = dict[str, Tensor]

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
_POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_PLAIN_POOLINGS = ("cls", "max", "mean")
# older releases wrote a flag for each mode, and joined the modes in this order
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.SELU, nn.LeakyReLU,
        nn.Softplus, nn.Mish, nn.ReLU6, nn.Hardtanh, nn.Hardswish,
    )
}  # fmt: skip
KINDS = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")


class Pooling(nn.Module):
    """One vector per text from its token embeddings: their mean, largest values or first token."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, features: Features) -> Features:
        """Return features with sentence_embedding (batch, width × modes)."""
        hidden, mask = features[TOKENS], features["attention_mask"]
        pooled = torch.cat([pool(hidden, mask, mode) for mode in self.modes], dim=-1)
        return {**features, SENTENCE: pooled}


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Return one vector per text, (batch, width), from hidden (batch, sequence, width).

    `mask` (batch, sequence) is 1 for real tokens, wherever the padding stands.
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)  # (batch, sequence, 1)
    if mode == "cls":
        first = mask.to(torch.int32).argmax(dim=1)
        return hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    if mode == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(dim=1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


class Dense(nn.Module):
    """A projection of the sentence embedding, and an activation."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.activation_function = activation

    def forward(self, features: Features) -> Features:
        """Return features with sentence_embedding (batch, out features)."""
        return {**features, SENTENCE: self.activation_function(self.linear(features[SENTENCE]))}


class Normalize(nn.Module):
    """The sentence embedding at unit length."""

    def forward(self, features: Features) -> Features:
        """Return features with sentence_embedding of length 1."""
        return {**features, SENTENCE: F.normalize(features[SENTENCE], p=2, dim=-1)}


class WithoutPrompt(nn.Module):
    """A pooling that leaves out the tokens of a known prompt where a text begins with one.

    A graph is given the tokens of prompt and text together, so it looks for the prompts' tokens.
    `prompts` are (first tokens to look for, how many tokens to leave out), shorter ones first.
    """

    def __init__(self, pooling: nn.Module, prompts: Sequence[tuple[Sequence[int], int]]) -> None:
        super().__init__()
        self.pooling = pooling
        self.prompts = [(tuple(ids), count) for ids, count in prompts]

    def forward(self, features: Features) -> Features:
        """Return features with sentence_embedding of the tokens after the prompt."""
        mask = features["attention_mask"]
        if "input_ids" not in features:
            raise ModelError(
                "a pooling without the prompt needs the tokens, not their states alone"
            )
        made = self.pooling({**features, "attention_mask": self._kept(features["input_ids"], mask)})
        return {**features, SENTENCE: made[SENTENCE]}

    def _kept(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return `mask` (batch, sequence) without the prompt's tokens."""
        place = mask.cumsum(dim=1) * mask  # 1 for a row's first real token; 0 for padding
        skipped = torch.zeros_like(mask[:, 0])
        for prompt, count in self.prompts:
            hits = torch.zeros_like(skipped)
            for at, token in enumerate(prompt, start=1):
                hits = hits + ((place == at) & (ids == token)).to(mask.dtype).sum(dim=1)
            skipped = torch.where(hits == len(prompt), count, skipped)
        return mask * (place > skipped.unsqueeze(1)).to(mask.dtype)


def make_module(
    kind: str, path: str, files: Mapping[str, bytes], prompts: Mapping[str, str], tokenizer: Any
) -> nn.Module:
    """Return the module of `kind` whose settings and weights lie at `path` in `files`.

    Raises `ModelError` for one outside the closed list, settings that make no sense, weights that do
    not fit, or a module of the library's where that is not installed.
    """
    settings = read_settings(path, files)
    if kind == "Pooling":
        return _pooling(path, settings, prompts, tokenizer)
    if kind == "Normalize":
        named: dict[str, Any] = {
            k: settings[k] for k in ("module_input_name", "module_output_name") if k in settings
        }
        plain = set(named.values()) <= {SENTENCE, None}
        return Normalize() if plain else _of_library(kind, path, named)
    if kind == "Dense":
        return _dense(path, settings, files)
    known = {"LayerNorm": "dimension", "Dropout": "dropout"}[kind]
    made = _of_library(kind, path, {k: v for k, v in settings.items() if k == known})
    _load_(made, path, files)
    return made


def read_settings(path: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the settings of the module at `path`; a `ModelError` where they cannot be read."""
    try:
        return dict(json.loads(files.get(f"{path}/config.json", b"{}")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}/config.json cannot be read as settings: {error}") from error


def weights_as_safetensors(stored: bytes, where: str) -> bytes:
    """Return what a `pytorch_model.bin` holds as safetensors; nothing in it is executed."""
    from safetensors.torch import save

    try:
        found = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        return save({name: value.contiguous() for name, value in found.items()})
    except Exception as error:  # pickle, zip and type errors have no common type
        raise ModelError(f"{where}: the weights cannot be read: {_line(error)}") from error


def cut_columns_(module: nn.Module, columns: dict[str, tuple[Sequence[int], int]]) -> None:
    """Let `module` take features of which fewer channels are left.

    `columns` maps a feature to (the channels of the hidden states that it still has, how many times
    side by side), and is brought up to date. Raises `ModelError` for a module that needs them all.
    """
    inner = module.pooling if isinstance(module, WithoutPrompt) else module
    kind = type(inner).__name__
    source = getattr(inner, "module_input_name", SENTENCE)
    target = getattr(inner, "module_output_name", source)
    if kind == "Pooling":
        modes = pooling_modes(inner)
        channels, _ = columns[TOKENS]
        columns[SENTENCE] = (channels, len(modes))
    elif kind == "Normalize" and source in columns:
        columns[target] = columns[source]
    elif kind == "LayerNorm" and source in columns:
        channels, copies = columns[source]
        if len(channels) * copies != inner.dimension:
            raise ModelError(
                "the encoder's LayerNorm takes its statistics over all channels of the hidden states, "
                "so none can go; leave --hidden out"
            )
    elif kind == "Dense":
        _cut_dense_(inner, *columns[source]) if source in columns else None
        columns.pop(target, None)


def _cut_dense_(dense: Any, channels: Sequence[int], copies: int) -> None:
    linear: nn.Linear = dense.linear
    width = linear.in_features // copies
    kept = [copy * width + c for copy in range(copies) for c in channels]
    if len(kept) == linear.in_features:
        return
    if getattr(dense, "use_residual", False):
        raise ModelError(
            "the encoder's Dense adds what it is given to what it gives, so no channel of the hidden "
            "states can go; leave --hidden out"
        )
    linear.weight = nn.Parameter(linear.weight.detach()[:, kept].clone())
    linear.in_features = len(kept)
    if hasattr(dense, "in_features"):
        dense.in_features = len(kept)


def reads_tokens(module: nn.Module) -> bool:
    """Whether `module` works on every token's vector."""
    return getattr(module, "module_input_name", SENTENCE) == TOKENS


def pooling_modes(module: Any) -> tuple[str, ...]:
    """Return the modes that a pooling joins, ours or the library's."""
    modes = module.modes if isinstance(module, Pooling) else module.pooling_mode
    return (modes,) if isinstance(modes, str) else tuple(modes)


# --- each kind ----------------------------------------------------------------------------------


def _pooling(
    path: str, settings: Mapping[str, Any], prompts: Mapping[str, str], tokenizer: Any
) -> nn.Module:
    modes = _modes(settings)
    if set(modes) <= set(_PLAIN_POOLINGS):
        made: nn.Module = Pooling(modes)
    else:
        width = settings.get("embedding_dimension", settings.get("word_embedding_dimension", 1))
        made = _of_library("Pooling", path, {"embedding_dimension": width, "pooling_mode": modes})
    if settings.get("include_prompt", True):
        return made
    if "weightedmean" in modes:
        raise ModelError(
            f"{path}: a weighted mean without the prompt (include_prompt: false) is not supported"
        )
    return WithoutPrompt(made, _prompt_tokens(path, prompts, tokenizer))


def _modes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modes that are joined, in their order."""
    named = settings.get("pooling_mode")  # the newer layout names the mode itself
    if named:
        modes = tuple([named] if isinstance(named, str) else named)
    else:
        modes = tuple(mode for flag, mode in _FLAGS.items() if settings.get(flag))
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown or not modes:
        raise ModelError(f"pooling mode {unknown or '(none)'}; there are {', '.join(_POOLINGS)}")
    return modes


def _prompt_tokens(
    path: str, prompts: Mapping[str, str], tokenizer: Any
) -> list[tuple[list[int], int]]:
    """Return how to tell each prompt by a row's first tokens, and how many tokens it is.

    A tokenizer may join a prompt's end with the text after it, so only what stays before any text is
    looked for; the library leaves out as many tokens as the prompt alone has, and so does this.
    """
    texts = [text for text in prompts.values() if text]
    if not texts or tokenizer is None:
        raise ModelError(
            f"{path}: the pooling leaves the prompt out (include_prompt: false), and "
            "config_sentence_transformers.json names no prompts that a graph could look for; add them "
            'there under "prompts", or save the model with include_prompt: true'
        )
    found = []
    for text in dict.fromkeys(texts):
        ids = list(tokenizer(text)["input_ids"])
        count = len(ids) - (ids[-1] in tokenizer.all_special_ids)
        same = count
        for more in ("a", "The", "7", "'"):
            both = list(tokenizer(text + more)["input_ids"])
            agree = [a == b for a, b in zip(ids[:same], both)]
            same = agree.index(False) if False in agree else min(same, len(agree))
        if all(token in tokenizer.all_special_ids for token in ids[:same]):
            raise ModelError(
                f"{path}: the pooling leaves out the prompt {text!r}, whose tokens depend on the text "
                "after it, so a graph cannot find it; end the prompt with a space or a colon"
            )
        found.append((ids[:same], count))
    return sorted(found, key=lambda prompt: len(prompt[0]))


def _dense(path: str, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> nn.Module:
    """Return the projection at `path` with its activation."""
    activation = _activation(settings.get("activation_function", "torch.nn.Tanh"))
    names = {settings.get(f"module_{end}_name") for end in ("input", "output")}
    try:
        sizes = settings["in_features"], settings["out_features"], settings.get("bias", True)
        if names <= {SENTENCE, None} and not settings.get("use_residual"):
            made: nn.Module = Dense(nn.Linear(*sizes), activation)
        else:
            known = ("module_input_name", "module_output_name", "use_residual")
            given = {name: settings[name] for name in known if name in settings}
            made = _of_library(
                "Dense",
                path,
                dict(zip(("in_features", "out_features", "bias"), sizes))
                | {"activation_function": activation, **given},
            )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path}: the projection cannot be read: {_line(error)}") from error
    _load_(made, path, files)
    return made


def _activation(name: Any) -> nn.Module:
    """Return the activation that a Dense config names, from a closed list: no import by name."""
    module, _, kind = str(name).rpartition(".")
    if kind not in _ACTIVATIONS or not (
        module == "torch.nn" or module.startswith("torch.nn.modules.")
    ):
        raise ModelError(
            f"Dense activation {name!r} is not supported; torch.nn has {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[kind]()


def _load_(module: nn.Module, path: str, files: Mapping[str, bytes]) -> None:
    """Load the weights at `path` into `module`, strictly."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not module.state_dict():
        return
    try:
        weights = load(files[f"{path}/model.safetensors"])
        if isinstance(module, Dense):  # some leave the module's name out
            weights = {f"linear.{k.removeprefix('linear.')}": v for k, v in weights.items()}
        module.load_state_dict({name: value.float() for name, value in weights.items()})
    except KeyError as error:
        raise ModelError(f"{path}: the weights are missing ({error})") from error
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights cannot be read: {_line(error)}") from error


def _of_library(kind: str, path: str, settings: Mapping[str, Any]) -> nn.Module:
    """Return sentence-transformers' own module of `kind`; a `ModelError` says how to install it."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ModelError(
            f"{path}: this {kind} is run as sentence-transformers runs it, which is not installed; "
            "pip install 'onnxpress[sentence]'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            library = importlib.import_module("sentence_transformers.sentence_transformer.modules")
        except ImportError:  # its name in earlier releases
            library = importlib.import_module("sentence_transformers.models")
    kinds = {name: getattr(library, name) for name in KINDS}
    try:
        made: nn.Module = kinds[kind](**settings)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: sentence-transformers makes no {kind} of its settings ({_line(error)}); correct "
            "them, or upgrade it: pip install -U 'onnxpress[sentence]'"
        ) from error
    return made.eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
