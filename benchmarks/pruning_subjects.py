"""The models that `benchmarks.pruning` prunes, what they learn from, and what they are judged on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import quantization_subjects
from benchmarks.distillation import MINILM
from calib_data.errors import DataError

__all__ = ["MINILM", "Subject", "judge", "mixed", "subject"]

_HELD_OUT = 10  # the last of so many parts of a corpus is for judging
_STORIES = 256  # with each opening
_SENTENCES = 500  # of each corpus that judges how alike two encoders rank


@dataclass(frozen=True)
class Evaluation:
    """A metric on data."""

    metric: str  # of `calib_data.metrics`
    data: str
    columns: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Subject:
    """A model with what it is judged on, the figure of the table first."""

    name: str
    model: str
    evaluations: Mapping[str, Evaluation]
    prepare: Callable[[], None] = field(default=lambda: None)


def subject(name: str, data: Path, models: Path, out: Path, trained: Path) -> Subject:
    """Return the subject called `name`; its data are made in `out` by its `prepare`."""
    if name == "minilm":
        return _sentences(data, out)
    # those of the quantization benchmark, which made their data as well
    found = quantization_subjects.subjects(data, models, out / "subjects", trained)
    other = next(each for each in found if each.name == name)
    prepare = other.prepare
    if name == "stories":
        prepare = partial(_write_more, other.prepare, out / "subjects" / "stories")
    judged = {
        f"{other.metric} on {label}": Evaluation(other.metric, spec, columns)
        for label, (spec, columns) in other.evaluations.items()
    }
    return Subject(name, other.model, judged, prepare)


def mixed(data: Path, evened: bool = False) -> tuple[str, ...]:
    """Return the options that read unlabelled sentences of several domains, without what judges.

    `evened` takes small corpora several times, altered, half of all texts being of SST-2 otherwise,
    and adds docstrings, for there are few sentences of documentation.
    """
    parts = [  # how often if evened, what, and its columns
        ("2~", f"{data}/stsb/train.csv", "sentence1,sentence2,_"),
        ("2~", f"{data}/multi30k/train.en", ""),
        ("", f"{data}/sst2/train.tsv", ""),
        ("6~", "OUT/texts/agnews.train.tsv", "text,_"),
        ("16~", "OUT/texts/wikitext2.train.txt", ""),
        ("8~", "OUT/texts/trec.train.txt", ""),
        ("10~", "pydoc:train", ""),
        ("3~", "docstrings:train", ""),
    ]
    if not evened:
        parts = [("", spec, own) for _, spec, own in parts[:-1]]
    texts = ",".join(f"{times}{spec}" for times, spec, _ in parts)
    columns = ";".join(own for *_, own in parts)
    return "--data", texts, "--columns", columns, "--max-length", "64"


def _sentences(data: Path, out: Path) -> Subject:
    corpora = {
        "multi30k": (f"{data}/multi30k/val.en", None),
        "SST-2": (f"{data}/sst2/dev.tsv", None),
        "agnews": (f"{out}/texts/agnews.test.tsv", "text,_"),
        "wikitext": (f"{out}/texts/wikitext2.test.txt", None),
        "trec": (f"{out}/texts/trec.test.txt", None),
        "pydoc": ("pydoc:test", None),
    }
    stsb = Evaluation("spearman", f"{data}/stsb/dev.csv", "sentence1,sentence2,score")
    alike = {
        name: Evaluation("rank_fidelity", spec, columns, _SENTENCES)
        for name, (spec, columns) in corpora.items()
    }
    return Subject("minilm", MINILM, {"STS-B dev": stsb, **alike}, partial(_split_all, data, out))


def _split_all(data: Path, out: Path) -> None:
    for source, name in (
        ("agnews/train_subset_10k.tsv", "agnews"),
        ("wikitext2/train_prefix.txt", "wikitext2"),
    ):
        split_lines(data / source, out / "texts" / name)
    # a question follows its class
    split_lines(data / "trec" / "train.txt", out / "texts" / "trec", "latin-1", skip_word=True)


def _write_more(prepare: Callable[[], None], folder: Path) -> None:
    """Write texts of the model to heal it on: those that calibrate it would be learned by heart."""
    prepare()
    openings = quantization_subjects.OPENINGS * _STORIES
    sampling = ("--temperature", "1", "--seed", "2")
    quantization_subjects.write_stories(
        folder / "float.onnx", folder / "healing.jsonl", openings, sampling
    )


def split_lines(
    source: Path, target: Path, encoding: str = "utf-8", skip_word: bool = False
) -> None:
    """Write the lines of a file as TARGET.train and TARGET.test, the last tenth being the test.

    Raises `DataError` if there is no such file.
    """
    suffix = source.suffix
    train, test = (target.with_name(f"{target.name}.{part}{suffix}") for part in ("train", "test"))
    if train.exists() and test.exists():
        return
    if not source.is_file():
        raise DataError(f"there is no {source}; name the folder that holds the data sets")
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in source.read_text(encoding).splitlines() if line.strip()]
    if skip_word:
        lines = [line.partition(" ")[2] for line in lines]
    cut = len(lines) - len(lines) // _HELD_OUT
    for path, part in ((train, lines[:cut]), (test, lines[cut:])):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")


def judge(subject: Subject, model: str) -> dict[str, float]:
    """Return every figure of `model`, a checkpoint that stands in for the subject's."""
    from calib_data.metrics import measure_metric
    from calib_data.sources import open_data
    from compress.loading import open_checkpoint

    made, source = open_checkpoint(model), open_checkpoint(subject.model)
    found = {}
    for label, each in subject.evaluations.items():
        examples = open_data(each.data, each.columns, each.limit)
        names = getattr(made.config, "id2label", None) or {}
        if examples.label_names and set(examples.label_names) <= set(names.values()):
            examples = examples.relabel([names[i] for i in sorted(names)])
        if each.metric == "rank_fidelity" and _vocabulary(made) != _vocabulary(source):
            continue  # one batch is for both, whose tokens have other numbers
        found[label] = measure_metric(
            each.metric,
            made.predict,
            examples,
            made.processor,
            task=made.task,
            max_length=made.max_length,
            reference=source.predict,
        ).value
    return found


def _vocabulary(checkpoint: Any) -> int:
    """Return how many tokens the tokenizer knows."""
    return len(checkpoint.processor)
