"""Bundles opened by the ecosystem's own clients, in an interpreter of their own.

optimum-onnx needs an older transformers than this project, so it lives in another virtual
environment: `ONNXPRESS_CLIENTS` names its Python (CONTRIBUTING.md says how to make one).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from export.graph import ExportConfig
from export.publish import export_onnx
from tests.tiny import tiny_checkpoint, write_sentence_encoder

PYTHON = os.environ.get("ONNXPRESS_CLIENTS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="ONNXPRESS_CLIENTS names no Python with optimum-onnx"
    ),
]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


def export(checkpoint: Checkpoint, folder: Path) -> Path:
    bundle, _ = export_onnx(checkpoint, folder / "bundle", ExportConfig())
    for path in bundle.path.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    return bundle.path


def ask(client: str, bundle: Path, request: dict[str, Any]) -> Any:
    path = bundle.parent / "request.json"
    path.write_text(json.dumps(request))
    script = Path(__file__).with_name("run_client.py")
    done = subprocess.run(
        [str(PYTHON), str(script), client, str(bundle), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ids(checkpoint: Checkpoint, rows: int = 2, length: int = 6) -> list[list[int]]:
    sample = checkpoint.signature.sample(rows, length)
    return sample["input_ids"].tolist()


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_feature_extraction(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family)
    inputs = {"input_ids": ids(checkpoint), "attention_mask": MASK}
    found = ask("features", export(checkpoint, tmp_path), inputs)
    batch = {name: torch.tensor(value) for name, value in inputs.items()}
    if "token_type_ids" in checkpoint.signature.names:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    real = np.array(MASK, bool)
    expected = checkpoint.predict(batch)["last_hidden_state"]
    np.testing.assert_allclose(np.array(found)[real], expected[real], atol=1e-5)


def test_sequence_classification(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("distilbert", "text-classification")
    inputs = {"input_ids": ids(checkpoint), "attention_mask": MASK}
    found = ask("classes", export(checkpoint, tmp_path), inputs)
    expected = checkpoint.predict({name: torch.tensor(value) for name, value in inputs.items()})
    np.testing.assert_allclose(found, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2"])
def test_text_generation(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, "text-generation")
    inputs = {"input_ids": ids(checkpoint), "attention_mask": [[1] * 6, [0, 0, 1, 1, 1, 1]]}
    found = ask("continuation", export(checkpoint, tmp_path), {**inputs, "new": 12})
    module: Any = checkpoint.backbone
    expected = module.generate(
        **{name: torch.tensor(value) for name, value in inputs.items()},
        max_new_tokens=12, min_new_tokens=12, do_sample=False,
    )  # fmt: skip
    assert found == expected.tolist()


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_text_to_text(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, "text2text-generation")
    inputs = {"input_ids": ids(checkpoint), "attention_mask": MASK}
    found = ask("translation", export(checkpoint, tmp_path), {**inputs, "new": 8})
    module: Any = checkpoint.backbone
    expected = module.generate(
        **{name: torch.tensor(value) for name, value in inputs.items()},
        max_new_tokens=8, min_new_tokens=8, do_sample=False,
    )  # fmt: skip
    assert found == expected.tolist()


def test_sentence_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sentence_encoder(tmp_path / "model"))
    texts = ["the cat sat on the mat", "a dog"]
    found = ask("sentences", export(checkpoint, tmp_path), {"texts": texts})
    batch = checkpoint.processor(texts, padding=True, return_tensors="pt")
    expected = checkpoint.predict(batch)["sentence_embedding"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
