"""Adapted models through the gate as they are, and decoders with a prefix step by step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from calib_data.errors import ParityError
from compress.loading import open_checkpoint
from export.bundle import open_bundle
from export.generate import GenerateConfig, generate, open_decoding, settings_of
from export.graph import ExportConfig
from export.publish import check_bundle, export_onnx
from tests.compress.test_adapters import CLASSIFIER, DECODER, adapted
from tests.tiny import write


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("bert", CLASSIFIER, "lora"),
        ("bert", CLASSIFIER, "ia3"),
        ("bert", CLASSIFIER, "adapter"),
        ("bert", CLASSIFIER, "prefix"),
        ("llama", DECODER, "lora"),
        ("gpt2", DECODER, "prefix"),
        *(
            pytest.param(family, DECODER, method, marks=pytest.mark.exhaustive)
            for family in ("gpt2", "llama")
            for method in ("lora", "ia3", "adapter", "prefix")
            if (family, method) not in (("llama", "lora"), ("gpt2", "prefix"))
        ),
    ],
)
def test_adapted_models_pass_the_gate(family: str, task: str, method: str, tmp_path: Path) -> None:
    made = open_checkpoint(write(adapted(family, task, method), tmp_path / "saved"))
    bundle, report = export_onnx(made, tmp_path / "onnx", ExportConfig())
    assert report.passed
    torch.manual_seed(0)
    with torch.no_grad():  # the twin: another adapter is another model
        for name, parameter in made.module.named_parameters():
            if name.endswith(("lora_B.default.weight", "ia3_l.default", "up.weight")) or (
                "prefix_encoder" in name
            ):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    with pytest.raises(ParityError):
        check_bundle(made, bundle).raise_if_failed()


def test_a_prefix_is_not_seen_in_the_cache(tmp_path: Path) -> None:
    made = adapted("llama", DECODER, "prefix")
    export_onnx(made, tmp_path / "onnx", ExportConfig())
    prompts = [[7, 8, 9, 10], [11, 12]]
    config = GenerateConfig(max_new_tokens=5)
    bundle = open_bundle(tmp_path / "onnx")
    found = generate(open_decoding(bundle), prompts, settings_of(bundle, config))
    for prompt, tokens in zip(prompts, found.tokens):
        ids = list(prompt)
        for token in tokens:  # without a cache, and without padding
            batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
            logits = made.predict({k: v.long() for k, v in batch.items()})["logits"]
            assert token == int(np.argmax(logits[0, -1]))
            ids.append(token)
