from pathlib import Path

import pytest
import torch
from transformers import BigBirdConfig, BigBirdModel, LlamaConfig, LlamaForCausalLM

from calib_data.errors import ParityError
from compress.checkpoint import Checkpoint
from compress.signature import transformer_signature
from export.branches import switches
from export.graph import ExportConfig
from export.parts import parts
from export.publish import export_onnx
from tests.tiny import tiny_checkpoint

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def bigbird() -> Checkpoint:
    config = BigBirdConfig(
        **SIZES, attention_type="block_sparse", block_size=4, num_random_blocks=1, pad_token_id=0
    )
    torch.manual_seed(0)
    model = BigBirdModel(config).eval()
    return Checkpoint(model, "feature-extraction", transformer_signature(model, model, None))


def test_length_at_which_a_model_begins_to_attend_by_blocks() -> None:
    """(5 + 2 × random blocks) × block size = 28 tokens are attended to in full, as its code says."""
    assert switches(bigbird(), 64) == [29]


def test_graph_with_one_of_two_branches_is_refused_with_the_length(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"from 29 tokens on .* one branch"):
        export_onnx(bigbird(), tmp_path / "out", ExportConfig())
    assert not (tmp_path / "out").exists()


def test_frequencies_that_change_beyond_the_trained_length() -> None:
    config = LlamaConfig(
        **SIZES | {"max_position_embeddings": 48},
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    )
    model = LlamaForCausalLM(config).eval()
    checkpoint = Checkpoint(model, "text-generation", transformer_signature(model, model, None))
    (part,) = parts(checkpoint).values()
    assert switches(part, 48) == [21]


def test_most_models_have_none() -> None:
    for family in ("bert", "roberta"):
        assert switches(tiny_checkpoint(family), 64) == []
