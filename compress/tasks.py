"""What a model is for: one row per task, found from the config's `architectures`.

A task here is a table row, not a class hierarchy: which transformers class opens it and what its
training target is. The rows are tried in order, so an architecture that transformers lists under
two tasks gets the more telling one first.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from calib_data.errors import ConfigError, DataError, ModelError

Target = Literal["none", "class", "next-token", "masked-token", "translation", "embedding"]


@dataclass(frozen=True)
class Task:
    """One task: its name, the transformers class that opens it, and its training target.

    `data` are the roles of what it is trained on, empty where it is not; `a|b` is either.
    """

    name: str
    auto_class: str
    target: Target
    output: str  # the output that metrics and losses look at
    data: tuple[str, ...] = ()

    def lacks(self, roles: Collection[str]) -> list[str]:
        """Return what its training data must hold besides `roles`."""
        return [role for role in self.data if not set(role.split("|")) & set(roles)]

    @property
    def labelled(self) -> bool:
        """Whether its training data carries an answer that other tasks have no use for."""
        return any("label" in role for role in self.data)


_ROWS = (
    Task(
        "text2text-generation",
        "AutoModelForSeq2SeqLM",
        "translation",
        "logits",
        ("text", "text_pair"),
    ),
    Task("text-generation", "AutoModelForCausalLM", "next-token", "logits", ("text",)),
    Task("fill-mask", "AutoModelForMaskedLM", "masked-token", "logits", ("text",)),
    Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        "class",
        "logits",
        ("text", "label|score"),
    ),
    Task("token-classification", "AutoModelForTokenClassification", "none", "logits"),
    Task("question-answering", "AutoModelForQuestionAnswering", "none", "start_logits"),
    Task(
        "zero-shot-image-classification",
        "AutoModelForZeroShotImageClassification",
        "none",
        "logits_per_image",
    ),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        "class",
        "logits",
        ("image", "label"),
    ),
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


def training_task(config: Any, roles: Collection[str], wanted: str | None, own: str) -> Task:
    """Return what a model with this config is trained for on data with these roles.

    `wanted` if it is given; else the task that the data has labels for; else the model's `own`; else
    the only one that the data and the architecture allow. Raises `DataError` for data that lacks
    something, `ConfigError` where several tasks are left, or none.
    """
    if wanted is not None:
        row = get_task(wanted)
        if not row.data:
            trained = ", ".join(task.name for task in _ROWS if task.data)
            raise ConfigError(f"--task {wanted} cannot be trained; choose one of {trained}")
        if lacking := row.lacks(roles):
            raise DataError(
                f"{wanted} needs data with {' and '.join(lacking)}, this has "
                f"{', '.join(sorted(roles))}; name the column with --columns ROLE=COLUMN"
            )
        return row
    fitting = [row for row in _ROWS if row.data and not row.lacks(roles)]
    for choice in (
        [row for row in fitting if row.labelled],
        [row for row in fitting if row.name == own],
        [row for row in fitting if type(config) in mapping_of(row)],
    ):
        if len(choice) == 1:
            return choice[0]
    held = ", ".join(sorted(roles))
    if not fitting:
        raise DataError(f"no task is trained on data with {held} alone; name the labels' column")
    options = ", ".join(row.name for row in fitting)
    raise ConfigError(
        f"data with {held} can train several tasks; pass --task with one of {options}"
    )


def mapping_of(task: Task) -> Any:
    """Return transformers' mapping from configs to the classes that open the task."""
    import transformers

    return getattr(transformers, task.auto_class)._model_mapping


def task_of(config: Any, fallback: str | None = None) -> Task:
    """Return the task that a transformers config's `architectures` names.

    Where the config names none that transformers knows, it is `fallback`; without, `ModelError`.
    """
    names = list(getattr(config, "architectures", None) or [])
    for row in _ROWS:
        classes = mapping_of(row)._model_mapping
        for name in names:
            if any(name == known or name in known for known in classes.values()):
                return TASKS["feature-extraction"] if row.auto_class == "AutoModel" else row
    if fallback is not None:
        return get_task(fallback)
    raise ModelError(
        f"config.json names the architecture {', '.join(names) or '(none)'}, which fits no task; "
        f"pass --task with one of {', '.join(TASKS)}"
    )
