"""What a model takes and gives: names, dtypes and dynamic axes, asked of the model itself."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, ModelError
from compress.fresh import unchanged

Kind = Literal[
    "ids", "mask", "types", "boxes", "positions", "pixels", "hidden", "past", "flag", "example"
]

# name → (what it holds, dynamic axes): the ecosystem's names for what a model may take
_KNOWN: dict[str, tuple[Kind, dict[int, str]]] = {
    "input_ids": ("ids", {0: "batch", 1: "sequence"}),
    "attention_mask": ("mask", {0: "batch", 1: "sequence"}),
    "token_type_ids": ("types", {0: "batch", 1: "sequence"}),
    "bbox": ("boxes", {0: "batch", 1: "sequence"}),
    "pixel_values": ("pixels", {0: "batch"}),
    "decoder_input_ids": ("ids", {0: "batch", 1: "decoder_sequence"}),
}

# what a text's model may take beside the text, without which it answers for another input
_BESIDE_TEXT = {
    "langs": "the language",
    "pixel_values": "images",
    "image": "images",
    "images": "images",
    "image_embeds": "images",
    "visual_embeds": "images",
    "visual_feats": "images",
    "input_features": "audio",
    "speaker_embeddings": "a speaker",
    "xpath_tags_seq": "where in a page each token stands",
    "protein_input_ids": "a protein",
}
BOXES = 1001  # coordinates of a box are 0 … 1000 by convention, whatever a page measures


@dataclass(frozen=True)
class Input:
    """One input: its name, what it holds, its dynamic axes and the sizes of its fixed ones."""

    name: str
    kind: Kind
    axes: tuple[tuple[int, str], ...]
    shape: tuple[int, ...]  # of an example; dynamic axes hold any size
    dtype: str = "int64"
    values: int = 0  # whole numbers are below this; 0 where the signature knows


@dataclass(frozen=True)
class Signature:
    """A model's inputs and the names of its outputs, with what is needed to sample valid inputs."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    vocabulary: int = 0
    types: int = 1
    pad: int = 0
    longest: int | None = None  # most tokens that the model has positions for
    examples: tuple[Tensor, ...] = ()  # of a factory's module, in the order of `inputs`

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs' names, in order."""
        return tuple(item.name for item in self.inputs)

    @property
    def has_sequence(self) -> bool:
        """Whether some input has a sequence axis."""
        return any(axis == "sequence" for item in self.inputs for _, axis in item.axes)

    def to_json(self) -> dict[str, Any]:
        """Return all but the example tensors, as JSON gives them back: lists for tuples."""
        fields = {**vars(self), "inputs": [vars(item) for item in self.inputs]}
        del fields["examples"]
        return dict(json.loads(json.dumps(fields)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], examples: tuple[Tensor, ...] = ()) -> "Signature":
        """Make a signature from `to_json`'s dict."""
        inputs = tuple(
            Input(
                name=item["name"],
                kind=item["kind"],
                axes=tuple((int(axis), str(name)) for axis, name in item["axes"]),
                shape=tuple(item["shape"]),
                dtype=item["dtype"],
                values=item.get("values", 0),
            )
            for item in value["inputs"]
        )
        fields = {**value, "inputs": inputs, "outputs": tuple(value["outputs"])}
        return cls(**fields, examples=examples)

    @property
    def has_past(self) -> bool:
        """Whether it takes a key/value cache."""
        return any(item.kind == "past" for item in self.inputs)

    def sample(
        self,
        batch: int = 2,
        sequence: int = 16,
        seed: int = 0,
        ragged: bool = False,
        past: int = 0,
    ) -> dict[str, Tensor]:
        """Return valid random inputs: ids (batch, sequence), pixels (batch, channels, height, width).

        With `ragged`, rows have different lengths; they are padded on the right, and with a cache on
        the left, as generation does; images are one more than texts. `past` positions are in the
        cache already, where there is one.
        Raises `ConfigError` where that is more than the model has positions for.
        """
        total = past + sequence
        if self.has_sequence and self.longest is not None and total > self.longest:
            raise ConfigError(
                f"a sequence of {total} is longer than the model's {self.longest} positions"
            )
        random = torch.Generator().manual_seed(seed)
        masks: dict[int, Tensor] = {}

        def real(length: int, left: bool) -> Tensor:
            """Return which of (batch, length) tokens are real; the same for every input."""
            if length not in masks:
                lengths = torch.full((batch,), length)
                if ragged and length > 1:
                    lengths = torch.randint(1, length + 1, (batch,), generator=random)
                    lengths[0] = length
                order = torch.arange(length).unsqueeze(0)
                order = length - 1 - order if left else order
                masks[length] = order < lengths.unsqueeze(1)
            return masks[length]

        sizes = {
            "batch": batch,
            "sequence": sequence,
            "decoder_sequence": sequence,
            "past_sequence": past,
            "total_sequence": total,
            "encoder_sequence": min((sequence + 1) // 2 + 3, self.longest or 10**9),
            "text_batch_size": batch,
            "image_batch_size": batch + ragged,
        }
        masked = {name for item in self.inputs if item.kind == "mask" for _, name in item.axes}
        left = "total_sequence" in masked
        made: dict[str, Tensor] = {}
        for index, item in enumerate(self.inputs):
            shape = list(item.shape)
            for axis, name in item.axes:
                shape[axis] = sizes.get(name, shape[axis])
            if item.kind == "ids":
                # never the padding id: some models count positions from it
                ids = torch.randint(0, self.vocabulary - 1, shape, generator=random)
                ids = torch.where(ids >= self.pad, ids + 1, ids) % self.vocabulary
                if left:
                    ids = torch.where(real(total, True)[:, past:], ids, self.pad)
                elif dict(item.axes).get(1) in masked:
                    ids = torch.where(real(shape[1], False), ids, self.pad)
                made[item.name] = ids
            elif item.kind == "mask":
                made[item.name] = real(shape[1], left).long()
            elif item.kind == "positions":
                made[item.name] = positions_from(real(total, left).long(), sequence)
            elif item.kind == "types":
                types = (torch.arange(sequence) >= (sequence + 1) // 2).long() * (self.types > 1)
                made[item.name] = types.expand(batch, -1) * real(sequence, False)
            elif item.kind == "boxes":
                corners = torch.randint(0, item.values, (batch, sequence, 2, 2), generator=random)
                boxes = corners.sort(dim=2).values.flatten(2)  # left, top, right, bottom
                made[item.name] = boxes * real(sequence, False).unsqueeze(-1)
            elif item.kind in ("pixels", "hidden", "past"):
                values = torch.randn(shape, generator=random)
                made[item.name] = values.to(getattr(torch, item.dtype))
            elif item.kind == "flag":
                made[item.name] = torch.tensor([past > 0])
            else:
                made[item.name] = _resample(item, self.examples[index], shape, random)
        return made


def positions_from(mask: Tensor, sequence: int) -> Tensor:
    """Return the positions (batch, sequence) of the last tokens under `mask` (batch, total).

    Padding does not count; where it stands itself, the position is 0.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - sequence :]


def _resample(item: Input, example: Tensor, shape: list[int], random: torch.Generator) -> Tensor:
    """Return a tensor like `example` of another shape, its values drawn again."""
    if example.is_floating_point():
        spread = example.float().std(correction=0).item() if example.numel() > 1 else 1.0
        noise = torch.randn(shape, generator=random) * (spread or 1.0)
        return (noise + example.float().mean()).to(example.dtype)
    # whole numbers: only values that the example has are known to be valid
    picks = torch.randint(0, example.numel(), shape, generator=random)
    return example.flatten()[picks]


def named_outputs(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `module` and return its tensor outputs by name.

    Transformers' outputs keep their names; a bare tensor or tuple becomes output, output_1, ….
    Losses, caches and per-layer tuples are left out.
    """
    result = module(**inputs)
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        found = {name: value for name, value in result.items() if isinstance(value, Tensor)}
        found.pop("loss", None)
    else:
        values = [value for value in result if isinstance(value, Tensor)]
        found = {"output" if i == 0 else f"output_{i}": value for i, value in enumerate(values)}
    if not found:
        raise ModelError(
            f"{type(module).__name__} returns no tensor; return one, a tuple or a dict"
        )
    return found


def forward_names(module: nn.Module) -> list[str]:
    """Return the names of `module.forward`'s parameters."""
    return list(inspect.signature(module.forward).parameters)


def transformer_inputs(module: nn.Module, processor: Any) -> tuple[Input, ...]:
    """Return the inputs of a transformers model, from its forward and what its processor makes.

    Raises `ModelError` where that is more than is known here, or the model takes something beside
    its text that would be left out: an answer without it is that of another input.
    """
    config: Any = module.config
    accepted = forward_names(module)
    towers = has_towers(module)
    main = getattr(module, "main_input_name", "input_ids")
    if not isinstance(main, str) or main not in _KNOWN:
        raise ModelError(
            f"{type(module).__name__} takes {main!r}, which is not supported; "
            "hand it over as package.module:factory with example inputs"
        )
    made = made_by(getattr(processor, "tokenizer", processor) if towers else processor)
    names = [main]
    if towers:
        names = ["input_ids", "pixel_values"]
        if "attention_mask" in accepted and "attention_mask" in (made or ["attention_mask"]):
            names.append("attention_mask")  # some are trained on padding as if it were text
    elif main == "input_ids":
        names += [name for name in ("attention_mask", "bbox") if name in accepted]
        if "token_type_ids" in accepted and _types(config, made) > 0:
            names.append("token_type_ids")
        if getattr(config, "is_encoder_decoder", False):
            names.append("decoder_input_ids")
    if not towers:
        _refuse_left_out(module, [name for name in accepted if name not in names], made)
    inputs = []
    for name in names:
        kind, axes = _KNOWN[name]
        shape: tuple[int, ...] = (2, 16)
        values = 0
        if kind == "pixels":
            shape = (2, *pixel_shape(module, processor))
        elif kind == "boxes":
            shape, values = (2, 16, 4), _coordinates(module)
        if towers:
            axes = axes | {0: "image_batch_size" if kind == "pixels" else "text_batch_size"}
        dtype = "float32" if kind == "pixels" else "int64"
        inputs.append(Input(name, kind, tuple(axes.items()), shape, dtype, values))
    return tuple(inputs)


def made_by(processor: Any) -> list[str]:
    """Return the names of what a tokenizer or image processor makes of an input; none without one."""
    listed = list(getattr(processor, "model_input_names", []))
    if not callable(processor):
        return listed
    raw: Any = "a"
    if listed[:1] == ["pixel_values"]:
        raw = np.zeros((32, 32, 3), np.uint8)
    try:
        return list(processor(raw))
    except Exception:  # some want words with boxes, or images of other channels: no common type
        return listed


def _types(config: Any, made: list[str]) -> int:
    """Return how many token types a model tells apart, 0 for none that its tokenizer makes."""
    if made and "token_type_ids" not in made:
        return 0
    types = getattr(config, "type_vocab_size", None)
    # without a table of their own, types are embedded as if they were tokens
    return (2 if made else 0) if types is None else int(types)


def _refuse_left_out(module: nn.Module, left: list[str], made: list[str]) -> None:
    config: Any = module.config
    kind = type(module).__name__
    for name in left:
        if name == "token_type_ids" and getattr(config, "type_vocab_size", None) == 0:
            continue  # taken, and not looked at
        if name in made:
            raise ModelError(
                f"the model's own tokenizer or processor makes {name}, which {kind} takes and which "
                "is not supported; an export without it would answer for another input"
            )
    if getattr(module, "main_input_name", "") != "input_ids":
        return
    for name in left:
        if name == "langs" and getattr(config, "n_langs", 1) <= 1:
            continue
        if name == "pixel_values" and getattr(config, "visual_embed", None) is False:
            continue
        if name in _BESIDE_TEXT:
            raise ModelError(
                f"{kind} takes {name} ({_BESIDE_TEXT[name]}) beside its text, which is not supported; "
                "an export without it would answer for another input"
            )


def _coordinates(module: nn.Module) -> int:
    """Return how many whole numbers a box's coordinates may be; a `ModelError` where they are none."""
    suffixes = tuple(f"{side}_position_embeddings" for side in "xyhw")
    rows = [
        table.num_embeddings
        for name, table in module.named_modules()
        if name.endswith(suffixes) and isinstance(table, nn.Embedding)
    ]
    if not rows:
        raise ModelError(
            f"{type(module).__name__} takes bbox, and not as whole numbers that a table embeds; that "
            "is not supported"
        )
    return min(*rows, BOXES)


def pixel_shape(module: Any, processor: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model takes.

    They are as its image processor makes them, whatever config.json says: that is the size of a
    pretraining, perhaps. Without a processor it is config.json's. Raises `ModelError` where nothing
    says one size.
    """
    own = getattr(processor, "image_processor", processor)
    told = config_pixels(module)
    if not callable(own):
        if told is None:
            raise ModelError(
                f"config.json of {type(module).__name__} names no image_size, and there is no "
                "preprocessor_config.json to run; add the model's image processor"
            )
        return told
    channels = told[0] if told else 3
    sizes = [(67, 91), (120, 64)]
    found = {_processed(own, channels, size) for size in sizes}
    if len(found) > 1 and told is not None:  # it does not resize, then
        found = {_processed(own, channels, told[1:])} & {told}
    if len(found) != 1:
        raise ModelError(
            f"{type(own).__name__} makes images of several sizes ({_sizes(own, channels, sizes)}); a "
            "graph takes one: set size in preprocessor_config.json"
        )
    return next(iter(found))


def config_pixels(module: Any) -> tuple[int, int, int] | None:
    """Return (channels, height, width) as config.json names them, or None."""
    vision = getattr(module.config, "vision_config", module.config)
    size = getattr(vision, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(vision, "num_channels", 3)), int(height), int(width)


def _processed(processor: Any, channels: int, size: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape that an image processor makes of an image (height, width, channels)."""
    image = np.zeros((*size, channels) if channels > 1 else size, np.uint8)
    try:
        made = processor(images=[image], return_tensors="np")["pixel_values"]
    except Exception as error:  # of a processor that the directory brings: no common type
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{type(processor).__name__} does not take an image of {size[0]} × {size[1]} × {channels}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    shape = tuple(np.asarray(made).shape)
    if len(shape) != 4:
        raise ModelError(
            f"{type(processor).__name__} makes pixel_values of {len(shape)} axes, and not batch, "
            "channels, height and width; that is not supported"
        )
    return int(shape[1]), int(shape[2]), int(shape[3])


def _sizes(processor: Any, channels: int, sizes: list[tuple[int, int]]) -> str:
    made = (_processed(processor, channels, size) for size in sizes)
    return ", ".join(f"{height} × {width}" for _, height, width in made)


def has_towers(module: nn.Module) -> bool:
    """Whether `module` compares texts with images, each embedded by a part of its own."""
    config = getattr(module, "config", None)
    return all(hasattr(config, name) for name in ("text_config", "vision_config")) and all(
        hasattr(module, name) for name in ("get_text_features", "get_image_features")
    )


def transformer_signature(module: nn.Module, inner: nn.Module, processor: Any) -> Signature:
    """Return the signature of `module`, whose transformers model is `inner` (often the same).

    The outputs are found by running the model once on a short sample.
    """
    config: Any = inner.config
    text = getattr(config, "text_config", config)
    signature = Signature(
        inputs=transformer_inputs(inner, processor),
        outputs=(),
        vocabulary=getattr(text, "vocab_size", 0) or 0,
        types=_type_values(config),
        pad=_pad_id(config, processor),
        longest=positions_of(inner),
    )
    return with_outputs(signature, module)


def _type_values(config: Any) -> int:
    types = getattr(config, "type_vocab_size", None)
    return 2 if types is None else int(types) or 1


def with_outputs(signature: Signature, module: nn.Module) -> Signature:
    """Return `signature` with the output names that `module` gives on a short sample."""
    with torch.no_grad(), unchanged(module):
        sample = signature.sample(batch=2, sequence=4)
        try:
            outputs = named_outputs(module, sample)
        except (ModelError, MemoryError):
            raise
        except Exception as error:  # of any model's code: no common type
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in sample.items())
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{type(module).__name__} does not run on {shapes}: {type(error).__name__}: {reason}"
            ) from error
    fields = {**vars(signature), "outputs": tuple(outputs)}
    return Signature(**fields)


def positions_of(model: nn.Module) -> int | None:
    """Return how many positions a transformers model has, or None where there is no limit."""
    config: Any = model.config
    limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return limit - int(part.padding_idx) - 1  # RoBERTa starts counting after the padding id
    return limit


def _pad_id(config: Any, processor: Any) -> int:
    tokenizer = getattr(processor, "tokenizer", processor)
    for source in (tokenizer, config, getattr(config, "text_config", None)):
        pad = getattr(source, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            return pad
    return 0


def factory_signature(
    module: nn.Module, examples: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]] | None
) -> Signature:
    """Return the signature of a user's module from its example inputs.

    Where the factory gives no `axes`, the first axis of every input is the batch.
    """
    for name, named in (axes or {}).items():
        if name not in examples:
            raise ModelError(f"axes are named for {name}, and the inputs are {', '.join(examples)}")
        for axis in named:
            if not 0 <= axis < examples[name].dim():
                raise ModelError(
                    f"{name} has {examples[name].dim()} axes, and axis {axis} is named"
                )
    inputs = tuple(
        Input(
            name,
            "example",
            tuple(((axes or {}).get(name, {}) if axes is not None else {0: "batch"}).items()),
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
        )
        for name, value in examples.items()
    )
    with torch.no_grad():
        outputs = tuple(named_outputs(module, examples))
    return Signature(inputs, outputs, examples=tuple(examples.values()))
