import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib_data.batches import Batches
from calib_data.errors import ConfigError, ModelError
from calib_data.objectives import Masked
from compress.checkpoint import Checkpoint
from compress.distill import DistillConfig, cached_teacher, distill
from compress.observe import Observed, observe
from compress.teacher_cache import Kept, TeacherCache
from compress.training import TrainConfig
from tests.tiny import student_from_layers, tiny_batches, tiny_checkpoint, tiny_tokenizer

ALL = Kept(("last_hidden_state",), layers=(1,), embeddings=(0,), attention=(0,))
NEEDS = frozenset({"outputs", "layers", "embeddings", "attention"})


class Asked:
    """A teacher that counts how often it is asked."""

    def __init__(self, teacher: Checkpoint) -> None:
        self.teacher, self.rows = teacher, 0

    def __call__(self, batch: dict[str, Tensor]) -> Observed:
        if "rows" in batch:  # and is no sample
            self.rows += len(batch["rows"])
        return observe(self.teacher, batch, NEEDS)


def shuffled(count: int = 16, **settings: object) -> Batches:
    plain = tiny_batches(count)
    batches = Batches(
        plain.examples, tiny_tokenizer(), batch_size=4, seed=1, shuffle=True, **settings
    )
    return batches.numbered()


def cache(folder: Path, teacher: Checkpoint, batches: Batches, **settings: object) -> TeacherCache:
    return TeacherCache(teacher, Asked(teacher), batches, ALL, folder, **settings)


def run(made: TeacherCache, batches: Batches, epochs: int = 1) -> int:
    """Ask about every batch; return how many rows the teacher itself was asked about."""
    for epoch in range(epochs):
        for batch in batches.iterate(epoch):
            made(batch)
    return made._observer.rows


def close(one: Tensor, other: Tensor, mask: Tensor) -> bool:
    return torch.allclose(one[mask], other[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "side"), [("bert", "right"), ("llama", "left")])
def test_answers_equal_the_teachers_in_every_epoch(family: str, side: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(family)
    batches = shuffled()
    batches._content._left = side == "left"
    made = cache(tmp_path, teacher, batches)
    for epoch in range(3):
        for batch in batches.iterate(epoch):
            found, expected = made(batch), observe(teacher, batch, NEEDS)
            mask = batch["attention_mask"].bool()
            name = "last_hidden_state"
            assert close(found.outputs[name], expected.outputs[name], mask)
            assert close(found.layers[1], expected.layers[1], mask)
            assert close(found.embeddings[0], expected.embeddings[0], mask)
            for part in ("query", "key", "value"):
                mine, theirs = (getattr(o.attention[0], part) for o in (found, expected))
                assert mine.shape == theirs.shape
                assert close(mine.transpose(1, 2), theirs.transpose(1, 2), mask)
            assert not found.layers[1][~mask].any()
            assert found.layers[0].numel() == 0
    assert made._observer.rows == 16


def test_the_next_run_asks_no_more(tmp_path: Path) -> None:
    teacher, batches = tiny_checkpoint("bert"), shuffled()
    assert run(cache(tmp_path, teacher, batches), batches, 2) == 16
    assert run(cache(tmp_path, teacher, batches), batches, 2) == 0


def test_an_interrupted_run_is_continued(tmp_path: Path) -> None:
    teacher, batches = tiny_checkpoint("bert"), shuffled()
    first = cache(tmp_path, teacher, batches)
    for batch, _ in zip(batches, range(2)):
        first(batch)
    assert run(cache(tmp_path, teacher, batches), batches, 2) == 8


@pytest.mark.parametrize("what", ["teacher", "config", "data", "kept", "precision", "versions"])
def test_anything_else_is_asked_anew(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batches = tiny_checkpoint("bert"), shuffled()
    run(cache(tmp_path, teacher, batches), batches)
    settings: dict[str, object] = {}
    if what == "teacher":
        teacher = tiny_checkpoint("bert")
        with torch.no_grad():
            teacher.module.embeddings.word_embeddings.weight[0, 0] += 1e-3
    if what == "config":
        teacher = tiny_checkpoint("bert", hidden_act="relu")
    if what == "data":
        batches = shuffled(12)
    if what == "precision":
        settings = {"settings": {"precision": "bf16"}}
    if what == "versions":
        monkeypatch.setattr("compress.teacher_cache.versions", lambda: {"torch": "0"})
    made = cache(tmp_path, teacher, batches, **settings)
    if what == "kept":
        made = TeacherCache(teacher, Asked(teacher), batches, replace(ALL, layers=(0,)), tmp_path)
    assert run(made, batches) == len(batches.lengths)


def test_rows_that_change_are_noticed(tmp_path: Path) -> None:
    teacher, batches = tiny_checkpoint("bert"), shuffled()
    made = cache(tmp_path, teacher, batches)
    batch = next(iter(batches))
    made(batch)
    ids = batch["input_ids"].clone()
    ids[1, 1] += 1
    with pytest.raises(ConfigError, match=f"row {int(batch['rows'][1])} of the data has other"):
        made({**batch, "input_ids": ids})
    padding = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)
    made({**batch, "input_ids": padding})
    shorter = batch["attention_mask"].clone()
    shorter[0, 1] = 0
    with pytest.raises(ConfigError, match="other inputs"):
        made({**batch, "attention_mask": shorter})


def test_what_cannot_be_looked_up_is_refused(tmp_path: Path) -> None:
    teacher, batches = tiny_checkpoint("bert"), shuffled()
    with pytest.raises(ModelError, match="numbered"):
        cache(tmp_path, teacher, batches)(next(iter(tiny_batches())))
    masked = shuffled(objective=Masked(tiny_tokenizer()))
    with pytest.raises(ConfigError, match="masked anew"):
        cache(tmp_path, teacher, masked)
    with pytest.raises(ModelError, match="encoder–decoder"):
        cache(tmp_path, tiny_checkpoint("t5"), batches)


LOSSES = [
    ("bert", "text-classification", ("logits",)),
    ("bert", "text-classification", ("hidden", "relations")),
    ("bert", "feature-extraction", ("hidden",)),
    ("gpt2", "text-generation", ("logits", "hidden-cosine")),
    ("llama", "text-generation", ("reverse-kl", "relations")),
]


@pytest.mark.parametrize(("family", "task", "losses"), LOSSES)
def test_losses_are_those_of_asking_each_time(
    family: str, task: str, losses: tuple[str, ...], tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family, task, num_hidden_layers=4)
    student = student_from_layers(teacher, [0, 3])
    batches = shuffled()
    train = TrainConfig(steps=8, learning_rate=1e-3)  # two epochs
    config = DistillConfig(losses, train=train)
    told = [
        distill(teacher, student, batches, config, ask_teacher=ask).report["losses"]
        for ask in (
            cached_teacher(batches, tmp_path, train),
            cached_teacher(batches, tmp_path, train),  # from what is there
        )
    ]
    plain = distill(teacher, student, batches, config).report["losses"]
    assert told[0] == pytest.approx(plain, rel=1e-4)
    assert told[0] == told[1]


def test_embeddings_and_both_kinds_of_outputs(tmp_path: Path) -> None:
    from compress.loading import open_checkpoint
    from tests.tiny import write_sentence_encoder

    teacher = open_checkpoint(write_sentence_encoder(tmp_path / "teacher"))
    student = student_from_layers(teacher, [0])
    batches = shuffled()
    train = TrainConfig(steps=8)
    losses = ("embedding", "similarity", "contrastive", "hidden")
    config = DistillConfig(losses, layer_map="-1:-1,0:1", train=train)
    ask = cached_teacher(batches, tmp_path / "cache", train)
    cached, plain = (
        distill(teacher, student, batches, config, **chosen).report["losses"]
        for chosen in ({"ask_teacher": ask}, {})
    )
    assert cached == pytest.approx(plain, rel=1e-4)
    stored = {path.stem for path in (tmp_path / "cache").glob("*.npy")}
    assert stored == {"rows", "outputs.sentence_embedding", "layers.1", "embeddings.0"}


def test_images_are_cached_whole(tmp_path: Path) -> None:
    import datasets
    import numpy as np

    from calib_data.sources import Examples

    teacher = tiny_checkpoint("vit")
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (12, 12, 3), dtype=np.uint8) for _ in range(6)]
    table = datasets.Dataset.from_dict({"image": [image.tolist() for image in images]})
    examples = Examples(table.with_format("numpy"), "test data")
    batches = Batches(examples, teacher.processor, batch_size=4).numbered()
    made = TeacherCache(teacher, Asked(teacher), batches, replace(ALL, attention=()), tmp_path)
    assert run(made, batches, 2) == 6
    batch = next(iter(batches))
    assert torch.equal(made(batch).layers[1], observe(teacher, batch, NEEDS).layers[1])


def test_attention_maps_are_refused(tmp_path: Path) -> None:
    teacher = tiny_checkpoint("bert")
    batches = shuffled()
    train = TrainConfig(steps=2)
    with pytest.raises(ConfigError, match="use relations"):
        distill(
            teacher,
            student_from_layers(teacher, [0, 1]),
            batches,
            DistillConfig(("attention",), train=train),
            ask_teacher=cached_teacher(batches, tmp_path, train),
        )


_FILL = """
import sys, time
from pathlib import Path
from tests.compress.test_teacher_cache import cache, shuffled
from tests.tiny import tiny_checkpoint
batches = shuffled(64)
made = cache(Path(sys.argv[1]), tiny_checkpoint("bert"), batches)
for number, batch in enumerate(batches):
    made(batch)
    print(number, flush=True)
    time.sleep(0.02)
"""


def test_a_run_killed_while_filling_leaves_what_it_had(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _FILL, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 2:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait()
    teacher = tiny_checkpoint("bert")
    batches = shuffled(64)
    made = cache(tmp_path, teacher, batches)
    for batch in batches:
        found, expected = made(batch).layers[1], observe(teacher, batch, NEEDS).layers[1]
        assert close(found, expected, batch["attention_mask"].bool())
    assert 0 < made._observer.rows <= 52
