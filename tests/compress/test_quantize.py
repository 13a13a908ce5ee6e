import numpy as np
import pytest
import torch
from torch import nn

from calib_data.errors import ModelError
from compress.checkpoint import weights_sha256
from compress.int8 import DynamicInt8Linear, Int8Embedding
from compress.quantize import QuantizeConfig, dequantized, quantize, quantized_skeleton_
from tests.tiny import FAMILIES, tiny_checkpoint


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_stay_close(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    result = quantize(checkpoint, QuantizeConfig())
    assert weights_sha256(checkpoint.module) == before
    assert result.report["bytes_after"] < 0.6 * result.report["bytes_before"]
    sample = checkpoint.signature.sample(batch=4, sequence=16, ragged=True)
    exact, found = checkpoint.predict(sample), result.checkpoint.predict(sample)
    rounded = dequantized(result.checkpoint).predict(sample)
    for name, y in exact.items():
        errors = [float(np.sqrt(np.mean((z[name] - y) ** 2)) / y.std()) for z in (found, rounded)]
        assert 0 < errors[1] < 0.1, name  # int8 weights alone
        assert 0 < errors[0] < 0.15, name


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "vit"])
def test_all_linear_layers_and_tables_become_int8(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    made = quantize(checkpoint, QuantizeConfig()).checkpoint
    assert kinds(made.module, nn.Linear) == kinds(made.module, nn.Embedding) == []
    assert not [m for m in made.module.modules() if type(m).__name__ == "Conv1D"]
    tables = kinds(checkpoint.module, nn.Embedding)
    assert kinds(made.module, Int8Embedding) == tables
    linear = kinds(made.module, DynamicInt8Linear)
    assert made.quantization == {
        "scheme": "dynamic",
        "modules": [n for n, _ in checkpoint.module.named_modules() if n in {*tables, *linear}],
    }


def test_skipped_names_stay_float() -> None:
    made = quantize(tiny_checkpoint("bert"), QuantizeConfig(skip=("pooler.*", "*position*")))
    module = made.checkpoint.module
    assert kinds(module, nn.Linear) == ["pooler.dense"]
    assert kinds(module, nn.Embedding) == ["embeddings.position_embeddings"]


def test_subclasses_stay_float() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 5

    class Odd(nn.Linear):
        pass

    checkpoint = tiny_checkpoint("bert")
    table = checkpoint.module.embeddings.word_embeddings
    table.__class__ = Scaled
    checkpoint.module.pooler.dense.__class__ = Odd
    made = quantize(checkpoint, QuantizeConfig()).checkpoint
    assert type(made.module.embeddings.word_embeddings) is Scaled
    assert type(made.module.pooler.dense) is Odd
    assert kinds(made.module, DynamicInt8Linear)


def test_table_that_is_read_past_its_module_stays_float() -> None:
    made = quantize(tiny_checkpoint("deberta-v2"), QuantizeConfig()).checkpoint
    assert kinds(made.module, nn.Embedding) == ["encoder.rel_embeddings"]


def test_tied_head_gets_its_own_copy() -> None:
    checkpoint = tiny_checkpoint("gpt2", "text-generation")
    module = quantize(checkpoint, QuantizeConfig()).checkpoint.module
    assert isinstance(module.lm_head, DynamicInt8Linear)
    assert isinstance(module.transformer.wte, Int8Embedding)
    assert module.lm_head.scale.shape == module.transformer.wte.scale.shape


def test_dequantized_has_the_same_weights() -> None:
    made = quantize(tiny_checkpoint("gpt2"), QuantizeConfig()).checkpoint
    plain = dequantized(made)
    assert plain.quantization is None
    source, linear = made.module.h[0].attn.c_attn, plain.module.h[0].attn.c_attn
    assert linear.weight.equal((source.weight * source.scale).t())
    assert linear.bias.equal(source.bias)


def test_twice_is_refused() -> None:
    made = quantize(tiny_checkpoint("bert"), QuantizeConfig()).checkpoint
    with pytest.raises(ModelError, match="quantized already"):
        quantize(made, QuantizeConfig())


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        quantize(tiny_checkpoint("bert"), QuantizeConfig(skip=("*",)))


@pytest.mark.parametrize(
    "quantization",
    [{"scheme": "fp4", "modules": []}, {"scheme": "dynamic", "modules": ["encoder.layer.9.x"]}],
)
def test_manifest_that_does_not_fit_is_refused(quantization: dict) -> None:
    with pytest.raises(ModelError, match="manifest"):
        quantized_skeleton_(tiny_checkpoint("bert").module, quantization)
