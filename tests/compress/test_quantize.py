from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import weights_sha256
from compress.int8 import DynamicInt8Linear, Int8Embedding
from compress.loading import open_checkpoint
from compress.quantize import (
    SCHEMES,
    dequantized,
    quantize,
    quantized_skeleton_,
)
from compress.quantize_config import SCHEME_SETTINGS, QuantizeConfig
from compress.weight_only import WeightOnlyLinear
from tests.tiny import FAMILIES, SampledBatches, tiny_checkpoint, write

FOUR, EIGHT = (QuantizeConfig("weight-only", bits=bits) for bits in (4, 8))


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("config", "weights", "activations"),
    [
        (QuantizeConfig(), 0.15, 0.2),
        (QuantizeConfig("static"), 0.15, 0.2),
        (FOUR, 0.7, 0.7),
        (EIGHT, 0.15, 0.2),
    ],
    ids=["dynamic", "static", "4 bit", "8 bit"],
)
def test_outputs_stay_close(
    family: str, config: QuantizeConfig, weights: float, activations: float
) -> None:
    checkpoint = tiny_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    result = quantize(checkpoint, config, SampledBatches(checkpoint))
    assert weights_sha256(checkpoint.module) == before
    assert result.report["bytes_after"] < 0.6 * result.report["bytes_before"]
    sample = checkpoint.signature.sample(batch=4, sequence=16, ragged=True)
    exact, found = checkpoint.predict(sample), result.checkpoint.predict(sample)
    rounded = dequantized(result.checkpoint).predict(sample)
    for name, y in exact.items():
        errors = [float(np.sqrt(np.mean((z[name] - y) ** 2)) / y.std()) for z in (found, rounded)]
        assert 0 < errors[1] < weights, name  # quantized weights alone
        assert 0 < errors[0] < activations, name


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_linear_layers_and_tables_are_quantized(family: str, scheme: str) -> None:
    checkpoint = tiny_checkpoint(family)
    batches = SampledBatches(checkpoint)
    made = quantize(checkpoint, QuantizeConfig(scheme), batches).checkpoint
    assert kinds(made.module, nn.Linear) == kinds(made.module, nn.Embedding) == []
    assert not [m for m in made.module.modules() if type(m).__name__ in ("Conv1D", "Conv2d")]
    tables = kinds(checkpoint.module, nn.Embedding)
    assert kinds(made.module, Int8Embedding) == tables
    linear = kinds(made.module, SCHEMES[scheme].linear)
    defaults = {name: SCHEME_SETTINGS[scheme][name][0] for name in SCHEMES[scheme].shape}
    assert made.quantization == {
        "scheme": scheme,
        "embedding_bits": 8,
        **defaults,
        "modules": [n for n, _ in made.module.named_modules() if n in {*tables, *linear}],
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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_is_saved_and_loaded(family: str, bits: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, "text-generation" if family != "bert" else "fill-mask")
    config = QuantizeConfig("weight-only", bits=bits, block_size=16)
    made = quantize(checkpoint, config).checkpoint
    again = open_checkpoint(str(write(made, tmp_path / "small")))
    assert again.quantization == made.quantization
    assert weights_sha256(again.module) == weights_sha256(made.module)
    layers = [m for m in again.module.modules() if isinstance(m, WeightOnlyLinear)]
    assert {(layer.bits, layer.block_size) for layer in layers} == {(bits, 16)}
    sample = checkpoint.signature.sample(2, 9, ragged=True)
    for name, value in made.predict(sample).items():
        assert np.array_equal(again.predict(sample)[name], value)


def test_four_bits_are_small_on_disk(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert", hidden_size=256, intermediate_size=1024)
    sizes = {
        config: (write(quantize(checkpoint, config).checkpoint, tmp_path / str(config.bits))
                 / "model.safetensors").stat().st_size
        for config in (FOUR, EIGHT)
    }  # fmt: skip
    # 4 or 8 bits, with the bits of a scale and of a zero point for 32 weights
    assert sizes[FOUR] / sizes[EIGHT] == pytest.approx(5.125 / 9.25, rel=0.1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_weight_only_holds_the_weights(bits: int, family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    made = quantize(checkpoint, QuantizeConfig("weight-only", bits=bits)).checkpoint
    plain = dequantized(made)
    for name, module in plain.backbone.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        source = checkpoint.backbone.get_submodule(name)
        weight = source.weight.detach()
        weight = weight.t() if type(source).__name__ == "Conv1D" else weight
        error = (module.weight.data - weight).square().mean().sqrt() / weight.std()
        assert 0 < float(error) < {4: 0.12, 8: 0.007}[bits], name
        if source.bias is not None:
            assert module.bias.equal(source.bias)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "dynamic has no --bits"),
        ({"scheme": "dynamic", "block_size": 32}, "dynamic has no --block-size"),
        ({"scheme": "weight-only", "bits": 3}, "--bits must be one of 4, 8, got 3"),
        ({"scheme": "weight-only", "block_size": 48}, "--block-size must be one of"),
        ({"scheme": "weight_only"}, "--scheme must be one of dynamic, static, weight-only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig.from_json(values)


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
    [
        {"scheme": "fp4", "modules": []},
        {"scheme": "dynamic", "modules": ["encoder.layer.9.x"]},
        {"scheme": "weight-only", "modules": ["pooler.dense"]},
        {"scheme": "weight-only", "bits": 5, "block_size": 32, "modules": ["pooler.dense"]},
    ],
)
def test_manifest_that_does_not_fit_is_refused(quantization: dict) -> None:
    with pytest.raises(ModelError, match="manifest"):
        quantized_skeleton_(tiny_checkpoint("bert").module, quantization)
