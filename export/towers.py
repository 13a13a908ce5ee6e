"""Models of text and images, such as CLIP: the whole, and each tower by itself."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.signature import Input, has_towers
from compress.wrapper import Wrapper


class TextTower(Wrapper):
    """The part that embeds texts."""

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return text_embeds (batch, width), not yet of unit length."""
        backbone: Any = self.backbone
        return {"text_embeds": _features(backbone.get_text_features(**inputs))}


class VisionTower(Wrapper):
    """The part that embeds images."""

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return image_embeds (batch, width), not yet of unit length."""
        backbone: Any = self.backbone
        return {"image_embeds": _features(backbone.get_image_features(**inputs))}


def _features(found: Any) -> Tensor:
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def whole_and_towers(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the model and its towers under the names of their graphs; nothing where it has none."""
    if not has_towers(checkpoint.backbone):
        return {}
    signature, processor = checkpoint.signature, checkpoint.processor
    text = tuple(_alone(item) for item in signature.inputs if item.kind != "pixels")
    image = tuple(_alone(item) for item in signature.inputs if item.kind == "pixels")
    return {
        "model": checkpoint,
        "text_model": replace(
            checkpoint,
            module=TextTower(checkpoint.backbone).eval(),
            signature=replace(signature, inputs=text, outputs=("text_embeds",)),
            processor=getattr(processor, "tokenizer", None),
        ),
        "vision_model": replace(
            checkpoint,
            module=VisionTower(checkpoint.backbone).eval(),
            signature=replace(signature, inputs=image, outputs=("image_embeds",)),
            processor=getattr(processor, "image_processor", None),
        ),
    }


def _alone(item: Input) -> Input:
    """Return an input whose batch need not be told from another's."""
    return replace(item, axes=((0, "batch"), *item.axes[1:]))
