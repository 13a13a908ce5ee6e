"""Embedding tables of 4 bits: what they hold, how many bytes they take, and that they come back."""

import json
import re
from pathlib import Path

import pytest
import torch

from calib_data.errors import ConfigError, ModelError
from compress.int8 import Int8Embedding
from compress.loading import open_checkpoint
from compress.packed_embedding import PackedEmbedding, block_size
from compress.quantize import dequantized, quantize
from compress.quantize_config import QuantizeConfig
from tests.tiny import tiny_checkpoint, write

SMALL = QuantizeConfig(embedding_bits=4)


def test_rows_are_near_and_small() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 384)
    module = PackedEmbedding(50, 384, None, 128)
    module.quantize_(table)
    noise = (module.dequantize() - table).square().mean() / table.square().mean()
    assert noise < 0.012  # of a normal distribution, in 16 steps whose size is fitted
    stored = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    assert stored == 50 * (192 + 3 * 4 + 2)
    ids = torch.tensor([[3, 3, 49]])
    assert module(ids).equal(module.dequantize()[ids])


@pytest.mark.parametrize(
    ("width", "largest", "size"),
    [
        (384, 128, 128), (384, 32, 32), (320, 128, 64), (96, 64, 32), (96, 16, 16), (48, 32, 16),
        (40, 128, None), (7, 128, None),
    ],
)  # fmt: skip
def test_blocks_fill_the_rows(width: int, largest: int, size: int | None) -> None:
    assert block_size(width, largest) == size


def test_smaller_blocks_are_nearer_and_come_back(tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", hidden_size=128)
    table = source.backbone.embeddings.word_embeddings.weight.detach()
    errors = []
    for size in (128, 64, 32, 16):
        config = QuantizeConfig(embedding_bits=4, embedding_block_size=size)
        again = open_checkpoint(write(quantize(source, config).checkpoint, tmp_path / str(size)))
        words = again.backbone.embeddings.word_embeddings
        assert isinstance(words, PackedEmbedding)
        assert words.block_size == size
        errors.append(float((words.dequantize() - table).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[-1]


def test_a_manifest_without_a_block_size_means_what_it_did(tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", hidden_size=128)
    config = QuantizeConfig(embedding_bits=4, embedding_block_size=128)
    folder = write(quantize(source, config).checkpoint, tmp_path / "small")
    manifest = folder / "onnxpress.json"
    told = json.loads(manifest.read_text())
    del told["quantization"]["embedding_block_size"]
    manifest.write_text(json.dumps(told))
    words = open_checkpoint(folder).backbone.embeddings.word_embeddings
    assert words.block_size == 128


def test_a_checkpoint_with_small_tables_comes_back(tmp_path: Path) -> None:
    source = tiny_checkpoint("bert")
    made = quantize(source, SMALL).checkpoint
    embeddings = made.backbone.embeddings
    assert isinstance(embeddings.word_embeddings, PackedEmbedding)
    again = open_checkpoint(write(made, tmp_path / "small"))
    batch = source.signature.sample(2, 5)
    for name, expected in made.predict(batch).items():
        assert (again.predict(batch)[name] == expected).all()
    table = dequantized(made).backbone.embeddings.word_embeddings.weight
    assert table.equal(embeddings.word_embeddings.dequantize())


def test_a_width_without_blocks_keeps_eight_bits() -> None:
    source = tiny_checkpoint("bert", hidden_size=40, num_attention_heads=4)
    made = quantize(source, SMALL).checkpoint
    assert isinstance(made.backbone.embeddings.word_embeddings, Int8Embedding)


def test_other_numbers_of_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--embedding-bits"):
        QuantizeConfig(embedding_bits=3)
    with pytest.raises(ConfigError, match="add --embedding-bits 4"):
        QuantizeConfig(embedding_block_size=32)
    with pytest.raises(ConfigError, match="--embedding-block-size"):
        QuantizeConfig(embedding_bits=4, embedding_block_size=8)
    folder = write(quantize(tiny_checkpoint("bert"), SMALL).checkpoint, tmp_path / "small")
    manifest = folder / "onnxpress.json"
    text = manifest.read_text()
    for name, other in (("embedding_bits", 2), ("embedding_block_size", 24)):
        manifest.write_text(re.sub(rf'"{name}": \d+', f'"{name}": {other}', text))
        with pytest.raises(ModelError, match=f"{name} {other}"):
            open_checkpoint(folder)
