from pathlib import Path

import torch

from benchmarks.rounding import SCHEMES, SWITCHES, Figures, Subject, Told, rows, table
from compress.checkpoint import Checkpoint
from tests.tiny import SampledBatches, tiny_checkpoint


def test_rows_are_measured_once(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", num_hidden_layers=1)
    judged: list[Checkpoint] = []

    def judge(model: Checkpoint) -> Figures:
        judged.append(model)
        return {"perplexity": float(len(judged)), "error": 0.5}

    subject = Subject(checkpoint, SampledBatches(checkpoint), judge)
    found = list(rows("tiny", subject, tmp_path))
    assert len(found) == len(judged) == 1 + len(SCHEMES) * len(SWITCHES)
    assert judged[0] is checkpoint
    schemes = [(model.quantization or {})["scheme"] for model in judged[1:]]
    assert schemes == [scheme for scheme, _, _ in found[1:]]
    assert list(rows("tiny", subject, tmp_path)) == found
    assert len(judged) == len(found)
    (tmp_path / "tiny, static, gptq.json").unlink()
    assert len(list(rows("tiny", subject, tmp_path))) == len(found)
    assert len(judged) == len(found) + 1


def test_table_has_a_row_each() -> None:
    found = [
        ("float", "", {"Spearman": 86.7157, "error": 0.0}),
        ("static", "gptq", {"Spearman": 86.5, "error": 0.012345}),
    ]
    assert list(table(found)) == [
        "| scheme | switches | Spearman | error |",
        "|---|---|---|---|",
        "| float |  | 86.716 | 0 |",
        "| static | gptq | 86.500 | 0.01235 |",
    ]


def test_told_texts_depend_on_the_seed() -> None:
    checkpoint = tiny_checkpoint("llama", "text-generation")
    one, same, other = (Told(checkpoint, 3, 6, seed).ids for seed in (0, 0, 1))
    assert one.shape == (4, 7)
    assert one.equal(same)
    assert not one.equal(other)
    assert one[0].equal(other[0])  # greedy
    batch = next(iter(Told(checkpoint, 3, 6, 0)))
    assert bool((batch["attention_mask"] == 1).all())
    assert batch["input_ids"].dtype == torch.int64
