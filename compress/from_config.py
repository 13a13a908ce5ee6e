"""A model of random weights, from a config file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib_data.characters import character_tokenizer
from calib_data.errors import ConfigError, ModelError
from calib_data.sources import Examples
from compress.checkpoint import Checkpoint, weights_sha256
from compress.files import read_json
from compress.heads import Classes, new_model, seeded
from compress.loading import check_checkpoint, image_shape, open_processor, takes_images
from compress.signature import positions_of, transformer_signature
from compress.tasks import Task

CHARACTERS = "characters"  # what --tokenizer says for one made of the data
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(path: Path) -> Any:
    """Return the transformers config in a JSON file.

    Raises `ModelError` for a file that cannot be read, names no architecture that transformers knows,
    or has settings that the architecture refuses.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, Mapping) else None
    if kind is None:
        raise ModelError(f'{path} has no model_type; add one, as in "model_type": "gpt2"')
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{path}: this transformers knows no model_type {kind!r}")
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # validation errors have no common type
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is no config of {kind}: {reason}") from error


def checkpoint_from_config(
    path: Path,
    config: Any,
    task: Task,
    tokenizer: str | None,
    examples: Examples,
    classes: Classes | None,
    seed: int,
) -> Checkpoint:
    """Return a checkpoint of random weights, drawn from `seed`; `config` is changed to what it needs.

    `tokenizer` is a directory, `CHARACTERS` for one token per character of the examples, or None for
    the one beside the config file. Raises `ConfigError` for a text model without one, `ModelError`
    where the model cannot be made.
    """
    processor = None
    if "text" in examples.roles and "image" not in task.data:
        processor = _tokenizer(path, config, tokenizer, examples)
        _agree_(config, processor, tokenizer == CHARACTERS)
    if classes is not None:
        classes.set_(config)
    try:
        with seeded(seed):
            module = new_model(task, config)
    except Exception as error:  # of settings that do not go together; no common type
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: no model can be made of it: {reason}") from error
    if processor is None:
        processor = image_shape(module) if takes_images(module) else None
    elif positions_of(module) is not None:
        processor.model_max_length = min(processor.model_max_length, positions_of(module) or 0)
    checkpoint = Checkpoint(
        module=module,
        task=task.name,
        signature=transformer_signature(module, module, processor),
        processor=processor,
    )
    check_checkpoint(checkpoint, str(path))
    return checkpoint.with_stage("source", model=path.name, sha256=weights_sha256(module))


def _tokenizer(path: Path, config: Any, tokenizer: str | None, examples: Examples) -> Any:
    if tokenizer == CHARACTERS:
        return character_tokenizer(
            text for role in ("text", "text_pair") if role in examples.roles
            for text in examples.column(role)
        )  # fmt: skip
    found = open_processor(Path(tokenizer) if tokenizer else path.parent, text=True, images=False)
    if found is None:
        raise ConfigError(
            f"{tokenizer or path.parent} holds no tokenizer; pass --tokenizer DIRECTORY, or "
            f"--tokenizer {CHARACTERS} to make one of the data's characters"
        )
    return found


def _agree_(config: Any, tokenizer: Any, sizes: bool) -> None:
    """Let the config name the tokenizer's special tokens, and with `sizes` have its vocabulary."""
    for name in _ENDS:
        token = getattr(tokenizer, name)
        if token is not None or sizes:
            setattr(config, name, token)
    if sizes:
        config.vocab_size = len(tokenizer)
