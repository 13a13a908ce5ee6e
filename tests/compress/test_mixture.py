"""Float and quantized layers mixed: each mixture is what quantizing just those layers gives."""

import numpy as np
import pytest

from compress.checkpoint import weights_sha256
from compress.mixture import Mixture
from compress.quantize import prepare, quantize_only
from compress.quantize_config import QuantizeConfig
from tests.tiny import SampledBatches, tiny_checkpoint


@pytest.mark.parametrize("scheme", ["dynamic", "static", "weight-only"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_mixtures_are_what_quantizing_alone_gives(family: str, scheme: str) -> None:
    checkpoint, config = tiny_checkpoint(family), QuantizeConfig(scheme)
    before = weights_sha256(checkpoint.backbone)
    prepared = prepare(checkpoint, config, SampledBatches(checkpoint))
    mixture = Mixture(prepared, config)
    sample = checkpoint.signature.sample(2, 8, ragged=True)
    for names in (prepared.names[::2], (), prepared.names, prepared.names[1:3]):
        made = mixture.with_quantized_(names)
        alone = quantize_only(prepared, names, config) if names else checkpoint
        expected = alone.predict(sample)
        assert made.quantization == alone.quantization
        for output, y in made.predict(sample).items():
            assert np.array_equal(y, expected[output])
    assert weights_sha256(checkpoint.backbone) == before


def test_parameters_are_those_of_the_float_layer() -> None:
    checkpoint = tiny_checkpoint("bert")
    mixture = Mixture(prepare(checkpoint, QuantizeConfig()), QuantizeConfig())
    assert mixture.parameters("encoder.layer.0.attention.self.query") == 32 * 32 + 32
