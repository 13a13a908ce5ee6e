import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from calib_data.errors import ParityError
from compress.loading import open_checkpoint
from compress.tasks import TASKS
from export.graph import ExportConfig
from export.publish import export_onnx
from export.witness import told_witness
from tests.tiny import tiny_bert_config, tiny_tokenizer, write_sentence_encoder


def heard(directory: Path, out: Path) -> dict[str, object]:
    export_onnx(open_checkpoint(directory), out, ExportConfig())
    witness: dict[str, object] = json.loads((out / "parity.json").read_text())["witness"]
    return witness


def test_a_sentence_encoder_is_held_to_encode(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    entry = heard(write_sentence_encoder(tmp_path / "source"), tmp_path / "out")
    assert entry["library"] == "sentence-transformers"
    assert entry["version"] == library.__version__
    assert entry["graph"]
    assert f"sentence-transformers {library.__version__}'s encode" in told_witness(entry)


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "fill-mask"])
def test_a_head_is_held_to_the_class_of_the_config(task: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    auto = getattr(transformers, TASKS[task].auto_class)
    auto.from_config(tiny_bert_config()).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    entry = heard(source, tmp_path / "out")
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    assert (entry["class"], entry["version"]) == (architecture, transformers.__version__)
    assert entry["graph"]


def test_another_pooling_than_the_librarys_is_not_published(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    directory = write_sentence_encoder(tmp_path / "source")
    checkpoint = open_checkpoint(directory)
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 32, "pooling_mode": "cls"})
    )
    with pytest.raises(ParityError, match=r"sentence-transformers .* answers \[.*allowed"):
        export_onnx(checkpoint, tmp_path / "out", ExportConfig())
    assert not (tmp_path / "out").exists()
    kept = json.loads((tmp_path / "out.parity.json").read_text())
    assert not kept["passed"]
    assert kept["witness"]["deviation"] > 1e-3


def test_a_changed_checkpoint_has_no_source(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sentence_encoder(tmp_path / "source"))
    assert checkpoint.source == tmp_path / "source"
    assert checkpoint.with_stage("prune").source is None
    assert replace(checkpoint, structure={}).source is not None
