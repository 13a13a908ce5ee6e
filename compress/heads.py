"""A model for another task, or with other classes: the same transformer under a new head."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from calib_data.errors import DataError, ModelError
from calib_data.sources import Examples
from compress.checkpoint import Checkpoint
from compress.signature import transformer_signature
from compress.surgery import HIDDEN, resize_
from compress.tasks import Task, get_task, mapping_of


@dataclass(frozen=True)
class Classes:
    """What a classifier's outputs stand for: `names` of the classes, or their number alone.

    One score instead of classes is a regression.
    """

    count: int
    names: tuple[str, ...] | None = None
    regression: bool = False

    def set_(self, config: Any) -> None:
        """Let a transformers config describe these classes."""
        config.num_labels = self.count  # numbers them, LABEL_0 and so on
        if self.names:
            config.id2label = dict(enumerate(self.names))
            config.label2id = {name: index for index, name in enumerate(self.names)}
        config.problem_type = "regression" if self.regression else "single_label_classification"

    def fit(self, config: Any) -> bool:
        """Whether a classifier with this config knows these classes already."""
        if self.regression or _is_regression(config):
            return self.regression == _is_regression(config)
        known = set((getattr(config, "id2label", None) or {}).values())
        named = self.names is not None and not any(str(n).startswith("LABEL_") for n in known)
        return set(self.names or ()) <= known if named else self.count <= config.num_labels


def classes_of(examples: Examples) -> Classes:
    """Return the classes in `examples`; without labels, but with scores, a regression.

    Raises `DataError` for labels that are negative, or all the same.
    """
    if "label" not in examples.roles:
        return Classes(1, regression=True)
    labels = examples.column("label")
    if min(labels) < 0:
        row = labels.index(min(labels)) + 1
        raise DataError(
            f"{examples.spec}, example {row} has label {min(labels)}; classes are numbered from 0"
        )
    if len(set(labels)) < 2:
        told = examples.label_names[labels[0]] if examples.label_names else labels[0]
        raise DataError(
            f"{examples.spec} has only one label, {told}: there is nothing to tell apart; "
            "use data with two or more"
        )
    names = examples.label_names
    return Classes(len(names) if names else max(labels) + 1, names)


def with_head(
    checkpoint: Checkpoint, task: Task, classes: Classes | None, seed: int, anew: bool = False
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return `checkpoint` for `task`, and the names of the parameters that are new, drawn by `seed`.

    A checkpoint that is for the task, and knows the classes, comes back as it is unless `anew`.
    Raises `ModelError` where the architecture has no model for the task, or has other classes.
    """
    config = checkpoint.config
    if config is None or type(config) not in mapping_of(task):
        kind = getattr(config, "model_type", "a module of your own")
        raise ModelError(f"{kind} has no model for the task {task.name}; pass another --task")
    if checkpoint.task == task.name and not anew:
        if classes is not None and not classes.fit(config):
            known = ", ".join(map(str, config.id2label.values()))
            raise ModelError(
                f"the data's {_told(classes)} are not what the model knows ({known}); use matching "
                "data, or --new-head to let it learn them from the start"
            )
        return checkpoint, ()
    config = copy.deepcopy(config)
    if classes is not None:
        classes.set_(config)
    processor = _with_padding(checkpoint.processor, config) if classes else checkpoint.processor
    with seeded(seed):
        module = new_model(task, config)
    fresh, structure = _take_over_(module, checkpoint)
    made = replace(
        checkpoint,
        module=module,
        task=task.name,
        processor=processor,
        signature=transformer_signature(module, module, processor),
        structure=structure,
        sidecars={},
    )
    return made, fresh


def with_head_of(teacher: Checkpoint, student: Checkpoint, seed: int) -> Checkpoint:
    """Return `student` for the task of `teacher`, so that it can learn it.

    A student without a head, of the same width, gets the teacher's; what has another shape is drawn
    by `seed`. One with a head of its own, or of a teacher without one, comes back as it is. Raises
    `ModelError` where the student's architecture has no model for the task.
    """
    headless = get_task("feature-extraction").auto_class
    if student.config is None or teacher.config is None:
        return student
    if student.task_row.auto_class != headless or teacher.task_row.auto_class == headless:
        return student
    task, classes = teacher.task_row, None
    if task.target == "class":
        names = tuple(name for _, name in sorted(teacher.config.id2label.items()))
        classes = Classes(len(names), names, _is_regression(teacher.config))
    made, fresh = with_head(student, task, classes, seed)
    theirs, own = teacher.backbone.state_dict(), made.backbone.state_dict()
    with torch.no_grad():
        for name in fresh:
            if name in theirs and theirs[name].shape == own[name].shape:
                own[name].copy_(theirs[name])
    return made


def new_model(task: Task, config: Any) -> Any:
    """Return a model of random weights for `task`, in eval mode; its config names its class."""
    import transformers

    module = getattr(transformers, task.auto_class).from_config(config, dtype=torch.float32)
    module.config.architectures = [type(module).__name__]
    return module.eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the random state outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _take_over_(module: Any, checkpoint: Checkpoint) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Give `module` the transformer of `checkpoint`; return what stays new, and the structure."""
    source: Any = checkpoint.backbone
    old, new = _prefix(source), _prefix(module)
    structure = {
        key if key == HIDDEN else new + key.removeprefix(old): n
        for key, n in checkpoint.structure.items()
    }
    resize_(module, structure)
    weights = {key: v for key, v in source.state_dict().items() if key.startswith(old)}
    known = module.state_dict()
    moved = {new + key.removeprefix(old): value for key, value in weights.items()}
    # What the new model lacks, such as a pooler, it does not need.
    module.load_state_dict({k: v for k, v in moved.items() if k in known}, strict=False)
    fresh = tuple(name for name, _ in module.named_parameters() if name not in moved)
    return fresh, structure


def _prefix(model: Any) -> str:
    """Return what the names of the transformer's weights begin with inside `model`."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _with_padding(processor: Any, config: Any) -> Any:
    """Return the processor with a padding token: a decoder finds the end of a text by it."""
    if getattr(config, "pad_token_id", 0) is None:
        if getattr(processor, "pad_token_id", None) is None and hasattr(processor, "eos_token"):
            if processor.eos_token is None:
                raise ModelError("the tokenizer has neither a padding nor an end token; add one")
            processor = copy.deepcopy(processor)
            processor.pad_token = processor.eos_token
        config.pad_token_id = getattr(processor, "pad_token_id", None)
    return processor


def _is_regression(config: Any) -> bool:
    return config.num_labels == 1


def _told(classes: Classes) -> str:
    if classes.regression:
        return "scores"
    return f"labels {', '.join(classes.names)}" if classes.names else f"{classes.count} labels"
