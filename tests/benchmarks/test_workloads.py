from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.config import BenchmarkConfig
from benchmarks.runtimes import NEW, RUNTIMES, Source
from benchmarks.workloads import largest, make_workloads
from calib_data.errors import ConfigError
from tests.benchmarks.fakes import FakeSignature
from tests.tiny import tiny_checkpoint, write, write_sentence_encoder


def source(signature: Any, task: str = "feature-extraction", processor: Any = None) -> Source:
    return Source(task, signature, processor, 8, (), 1, {})


def test_workloads_of_images_have_no_sequence() -> None:
    class Images(FakeSignature):
        has_sequence = False

    config = BenchmarkConfig(shapes=((1, 32), (1, 64), (8, 64)))
    made = make_workloads(source(Images()), config)
    assert [(w.label, w.sequence, w.tokens) for w in made] == [
        ("1 image", None, None),
        ("8 images", None, None),
    ]
    assert largest(made).label == "8 images"


def test_real_texts_come_in_their_order_and_as_long_as_they_are(tmp_path: Path) -> None:
    write_sentence_encoder(tmp_path / "model")
    texts = [" ".join(["the cat"] * (1 + i % 7)) + f" {i % 3}" for i in range(100)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    config = BenchmarkConfig(shapes=((1, 8), (4, 8)), traffic=str(tmp_path / "texts.txt"))
    known = RUNTIMES["pytorch"].describe(str(tmp_path / "model"))
    *shapes, one, four = make_workloads(known, config)
    assert [w.kind for w in shapes] == ["shape", "shape"]
    assert (one.label, four.label, one.batch, four.batch) == ("1 text", "4 texts", 1, 4)
    assert (len(one.calls), len(four.calls)) == (64, 16)
    assert one.ragged
    assert not shapes[0].ragged
    assert len({call["input_ids"].shape[1] for call in one.calls}) > 3
    assert one.tokens is not None
    assert four.tokens == pytest.approx(
        np.mean([call["attention_mask"].sum() for call in four.calls])
    )
    assert "labels" not in four.calls[0]
    assert largest([one, *shapes]) is shapes[1]
    again = make_workloads(known, config)[-1]
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(four.calls, again.calls))
    few = BenchmarkConfig(shapes=((101, 8),), traffic=str(tmp_path / "texts.txt"))
    with pytest.raises(ConfigError, match="less than a batch of 101"):
        make_workloads(known, few)
    with pytest.raises(ConfigError, match="--traffic is of texts"):
        make_workloads(source(FakeSignature()), config)


def test_prompts_ask_for_a_token_and_for_all(tmp_path: Path) -> None:
    write(tiny_checkpoint("gpt2", "text-generation"), tmp_path / "model")
    known = RUNTIMES["pytorch"].describe(str(tmp_path / "model"))
    config = BenchmarkConfig(shapes=((1, 4),), prompts=(3, 5), new_tokens=4)
    _, *made = make_workloads(known, config)
    labels = ["3, first token", "3 + 4 tokens", "5, first token", "5 + 4 tokens"]
    assert [w.label for w in made] == labels
    assert [int(w.calls[0][NEW]) for w in made] == [1, 4, 1, 4]
    assert made[-1].calls[0]["input_ids"].shape == (1, 5)
    with pytest.raises(ConfigError, match="--prompts is for text-generation"):
        make_workloads(source(FakeSignature()), config)
