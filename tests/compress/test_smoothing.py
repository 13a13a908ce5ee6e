from dataclasses import replace

import pytest
import torch
from torch import nn

from calib_data.errors import ConfigError
from compress.calibration import calibrate
from compress.checkpoint import Checkpoint, weights_sha256
from compress.quantize import prepare, quantize
from compress.quantize_config import QuantizeConfig
from compress.smoothing import Link, _same, find_links, scale_, smooth_, smoothed
from tests.tiny import EXPORT_ONLY, FAMILIES, SampledBatches, tiny_checkpoint

# family → norms, value projections and projections up that can be scaled, of two layers
LINKS = {
    "albert": (1, 2, 0),
    "bart": (0, 6, 0),
    "bert": (0, 2, 0),
    "camembert": (0, 2, 0),
    "clip_text_model": (4, 2, 0),
    "clip_vision_model": (4, 2, 0),
    "deberta-v2": (0, 2, 0),
    "deit": (4, 2, 0),
    "distilbert": (0, 2, 0),
    "electra": (1, 2, 0),
    "gemma": (4, 2, 2),
    "gpt2": (4, 2, 0),
    "gpt_neox": (4, 2, 0),
    "llama": (4, 2, 2),
    "marian": (0, 6, 0),
    "mistral": (4, 2, 2),
    "modernbert": (3, 2, 2),
    "mpnet": (0, 2, 0),
    "opt": (4, 2, 2),
    "phi": (2, 2, 0),
    "qwen2": (4, 2, 2),
    "qwen3": (4, 2, 2),
    "roberta": (0, 2, 0),
    "swin": (9, 4, 0),
    "t5": (10, 6, 4),
    "vit": (4, 2, 0),
    "xlm-roberta": (0, 2, 0),
}


def kinds(checkpoint: Checkpoint, links: list[Link]) -> tuple[int, int, int]:
    modules = [checkpoint.backbone.get_submodule(link.source) for link in links]
    norms = sum(module.weight.dim() == 1 for module in modules)
    downs = ("down_proj", "fc2", "wo", "mlp.Wo")
    ups = sum(link.readers[0].endswith(downs) for link in links)
    return norms, len(links) - norms - ups, ups


@pytest.mark.parametrize("family", sorted({*FAMILIES, *EXPORT_ONLY}))
def test_smoothed_computes_the_same(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    made, calibration = smoothed(checkpoint, 0.5, SampledBatches(checkpoint))
    assert weights_sha256(checkpoint.module) == before
    assert kinds(checkpoint, find_links(checkpoint)) == LINKS[family]
    assert weights_sha256(made.module) != before
    assert calibration.samples == 16
    sample = checkpoint.signature.sample(batch=3, sequence=9, seed=5, ragged=True)
    found, expected = made.predict(sample), checkpoint.predict(sample)
    for name, y in expected.items():
        assert float(abs(found[name] - y).max()) < 2e-5 * float(abs(y).max()), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt"])
def test_scaling_is_exact_in_double(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    links = find_links(checkpoint)
    checkpoint.module.double()
    sample = checkpoint.signature.sample(batch=3, sequence=9, ragged=True)
    with torch.inference_mode():
        before = checkpoint.forward(sample)
    generator = torch.Generator().manual_seed(0)
    for link in links:
        factor = torch.rand(link.channels, generator=generator, dtype=torch.float64) + 0.5
        scale_(checkpoint.backbone, link, factor)
    with torch.inference_mode():
        after = checkpoint.forward(sample)
    for name, y in before.items():
        assert y.dtype == torch.float64
        # attention of these families is in float32 at places
        assert float((after[name] - y).abs().max()) < 2e-6 * float(y.abs().max()), name


@pytest.mark.parametrize(
    ("family", "source", "reader"),
    [
        ("bert", "encoder.layer.0.output.LayerNorm", "encoder.layer.1.attention.self.value"),
        ("vit", "layers.0.mlp.fc1", "layers.0.mlp.fc2"),  # a GELU between them
        ("llama", "layers.0.mlp.gate_proj", "layers.0.mlp.down_proj"),
        ("llama", "layers.0.input_layernorm", "layers.0.self_attn.q_proj"),  # k and v read it too
        ("gpt2", "ln_f", "h.1.attn.c_attn"),
    ],
)
def test_scaling_what_is_no_link_is_noticed(family: str, source: str, reader: str) -> None:
    checkpoint = tiny_checkpoint(family)
    width = len(checkpoint.backbone.get_submodule(source).weight)
    every = torch.arange(width)
    sample = checkpoint.signature.sample(batch=2, sequence=8, ragged=True)
    before = checkpoint.predict(sample)
    assert _same(checkpoint.predict(sample), before)
    factor = torch.ones(width)
    factor[3] = 2
    scale_(checkpoint.backbone, Link(source, every, (reader,), every), factor)
    assert not _same(checkpoint.predict(sample), before)


def test_layer_that_is_not_called_is_no_link() -> None:
    checkpoint = tiny_checkpoint("llama")
    spare = tiny_checkpoint("llama", seed=1).module.layers[0]
    checkpoint.module.add_module("spare", spare)
    assert not [link for link in find_links(checkpoint) if link.source.startswith("spare")]


def outlying(family: str = "llama") -> Checkpoint:
    """Return a checkpoint whose first norm makes one channel 40 times as large, unseen outside."""
    checkpoint = tiny_checkpoint(family)
    link = next(x for x in find_links(checkpoint) if x.source == "layers.0.input_layernorm")
    factor = torch.ones(link.channels)
    factor[3] = 1 / 40
    scale_(checkpoint.backbone, link, factor)
    return checkpoint


def test_outliers_move_into_the_weights() -> None:
    checkpoint = outlying()
    reader = "layers.0.self_attn.q_proj"
    batches = SampledBatches(checkpoint)
    before = calibrate(checkpoint, [reader], batches).inputs[reader].channel_max
    made, _ = smoothed(checkpoint, 0.5, batches)
    after = calibrate(made, [reader], batches).inputs[reader].channel_max
    assert float(before.max() / before.median()) > 20
    assert float(after.max() / after.median()) < 10


def error(checkpoint: Checkpoint, config: QuantizeConfig) -> float:
    sample = checkpoint.signature.sample(batch=4, sequence=16, seed=9, ragged=True)
    made = quantize(checkpoint, config, SampledBatches(checkpoint)).checkpoint
    name = checkpoint.output
    exact = checkpoint.predict(sample)[name]
    return float(((made.predict(sample)[name] - exact) ** 2).mean() ** 0.5 / exact.std())


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_outliers_cost_less_once_moved(scheme: str) -> None:
    checkpoint = outlying()
    plain = QuantizeConfig(scheme)
    assert error(checkpoint, replace(plain, smooth=0.5)) < 0.6 * error(checkpoint, plain)


def test_factors_follow_the_formula() -> None:
    checkpoint = tiny_checkpoint("llama")
    link = next(x for x in find_links(checkpoint) if x.source.endswith("input_layernorm"))
    inputs = calibrate(checkpoint, link.readers[:1], SampledBatches(checkpoint)).inputs
    stats = inputs[link.readers[0]]
    stats.channel_max[5] = 0
    norm = checkpoint.backbone.get_submodule(link.source)
    weights = [checkpoint.backbone.get_submodule(name).weight for name in link.readers]
    largest = torch.cat(weights).detach().abs().amax(0)
    before = norm.weight.detach().clone()
    smooth_(checkpoint, [link], inputs, 0.7)
    factor = before / norm.weight.detach()
    assert float(factor[5]) == 1  # of a channel that was never used nothing is known
    known = torch.arange(32) != 5
    expected = (stats.channel_max**0.7 / largest**0.3)[known]
    expected = expected / expected.log().mean().exp()
    torch.testing.assert_close(factor[known], expected)


def test_only_settings_that_look_again_calibrate_again() -> None:
    checkpoint = tiny_checkpoint("llama")
    once = prepare(checkpoint, QuantizeConfig(smooth=0.5), SampledBatches(checkpoint)).calibration
    assert once is not None
    assert (once.fingerprint, once.samples, once.inputs) == ("sampled", 16, {})
    twice = QuantizeConfig(smooth=0.5, bias_correction=True)
    again = prepare(checkpoint, twice, SampledBatches(checkpoint)).calibration
    assert again is not None
    assert len(again.inputs) == 14


def test_model_without_links_is_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    module = nn.Sequential(checkpoint.module.embeddings, nn.Linear(32, 4))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = module, checkpoint.config

        def forward(self, input_ids: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
            return {"last_hidden_state": module[1](module[0](input_ids)).tanh()}

    plain = replace(checkpoint, module=Plain())
    with pytest.raises(ConfigError, match="leave out --smooth"):
        quantize(plain, QuantizeConfig(smooth=0.5), SampledBatches(checkpoint))
