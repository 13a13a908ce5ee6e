"""What a model is for: one row per task, found from the config's `architectures`.

A task here is a table row, not a class hierarchy: which transformers class opens it and what its
training target is. The rows are tried in order, so an architecture that transformers lists under
two tasks gets the more telling one first.
"""

from dataclasses import dataclass
from typing import Any, Literal

from calib_data.errors import ConfigError, ModelError

Target = Literal["none", "class", "next-token", "masked-token", "embedding"]


@dataclass(frozen=True)
class Task:
    """One task: its name, the transformers class that opens it, and its training target."""

    name: str
    auto_class: str
    target: Target
    output: str  # the output that metrics and losses look at


_ROWS = (
    Task("text2text-generation", "AutoModelForSeq2SeqLM", "none", "logits"),
    Task("text-generation", "AutoModelForCausalLM", "next-token", "logits"),
    Task("fill-mask", "AutoModelForMaskedLM", "masked-token", "logits"),
    Task("text-classification", "AutoModelForSequenceClassification", "class", "logits"),
    Task("token-classification", "AutoModelForTokenClassification", "none", "logits"),
    Task("question-answering", "AutoModelForQuestionAnswering", "none", "start_logits"),
    Task(
        "zero-shot-image-classification",
        "AutoModelForZeroShotImageClassification",
        "none",
        "logits_per_image",
    ),
    Task("image-classification", "AutoModelForImageClassification", "class", "logits"),
    Task("sentence-embedding", "AutoModel", "embedding", "sentence_embedding"),
    Task("feature-extraction", "AutoModel", "none", "last_hidden_state"),
)
TASKS = {task.name: task for task in _ROWS}
CUSTOM = Task("custom", "", "none", "")


def get_task(name: str) -> Task:
    """Return the task called `name`; a `ConfigError` lists the names there are."""
    if name == CUSTOM.name:
        return CUSTOM
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def task_of(config: Any) -> Task:
    """Return the task that a transformers config's `architectures` names.

    Raises `ModelError` where the config names none that transformers knows.
    """
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    for row in _ROWS:
        classes = getattr(transformers, row.auto_class)._model_mapping._model_mapping
        for name in names:
            if any(name == known or name in known for known in classes.values()):
                return TASKS["feature-extraction"] if row.auto_class == "AutoModel" else row
    raise ModelError(
        f"config.json names the architecture {', '.join(names) or '(none)'}, which fits no task; "
        f"pass --task with one of {', '.join(TASKS)}"
    )
