import json

import pytest
import torch
from torch import nn

from calib_data.errors import ConfigError, ModelError
from compress.signature import Input, Signature, factory_signature, named_outputs, positions_of
from tests.tiny import FAMILIES, VISION, tiny_checkpoint, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_shapes_asked_for_and_run(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    for batch, sequence, ragged in ((1, 1, False), (3, 9, True)):
        sample = checkpoint.signature.sample(batch, sequence, ragged=ragged)
        assert tuple(sample) == checkpoint.signature.names
        for name, value in sample.items():
            expected = (batch, 3, 12, 12) if name == "pixel_values" else (batch, sequence)
            assert tuple(value.shape) == expected
        outputs = checkpoint.predict(sample)
        assert tuple(outputs) == checkpoint.signature.outputs
        assert all(len(value) == batch for value in outputs.values())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*VISION, "bart", "t5"}))
def test_real_positions_never_hold_the_padding_id(family: str) -> None:
    signature = tiny_checkpoint(family).signature
    for seed in range(5):
        sample = signature.sample(8, 40, seed=seed, ragged=True)
        mask = sample["attention_mask"].bool()
        ids = sample["input_ids"]
        assert bool((ids[mask] != signature.pad).all())
        assert bool((ids[~mask] == signature.pad).all())
        assert bool((~mask).any())
        assert bool(mask[0].all())  # one row is as long as asked for
        assert 0 <= int(ids.min()) <= int(ids.max()) < signature.vocabulary
        assert bool((mask.int().diff(dim=1) <= 0).all())  # padded on the right


def test_samples_are_seeded() -> None:
    signature = tiny_checkpoint("bert").signature
    first, same, other = (signature.sample(seed=s)["input_ids"] for s in (0, 0, 1))
    assert first.equal(same)
    assert not first.equal(other)


def test_segments_are_used() -> None:
    types = tiny_checkpoint("bert").signature.sample(2, 6)["token_type_ids"]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    single = tiny_checkpoint("bert", type_vocab_size=1).signature.sample(2, 6)
    assert not single["token_type_ids"].any()


def test_too_long_a_sequence_is_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    assert checkpoint.check_length(64) == 64
    checkpoint.signature.sample(1, 64)
    for call in (checkpoint.check_length, lambda n: checkpoint.signature.sample(1, n)):
        with pytest.raises(ConfigError, match="model's 64 positions"):
            call(65)


@pytest.mark.parametrize("family", ["roberta", "camembert", "xlm-roberta", "mpnet", "bert", "opt"])
def test_longest_runs_and_one_more_does_not(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    longest = checkpoint.signature.longest
    assert longest is not None
    sample = checkpoint.signature.sample(1, longest)
    checkpoint.predict(sample)
    longer = {name: torch.cat([v, v[:, -1:]], dim=1) for name, v in sample.items()}
    with pytest.raises((IndexError, RuntimeError)):
        checkpoint.predict(longer)


def test_models_without_a_limit() -> None:
    assert positions_of(tiny_model("t5", max_position_embeddings=None)) is None
    checkpoint = tiny_checkpoint("t5", max_position_embeddings=None)
    assert checkpoint.signature.longest is None
    assert checkpoint.check_length(10_000) == 10_000


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "roberta"])
def test_round_trips_through_json(family: str) -> None:
    signature = tiny_checkpoint(family).signature
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


class Mixer(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, x


def test_factory_outputs_and_examples() -> None:
    examples = {"x": torch.randn(2, 5) * 3 + 1, "y": torch.tensor([[7, 3, 7, 3, 3]] * 2)}
    signature = factory_signature(Mixer(), examples, None)
    assert signature.outputs == ("output", "output_1")
    assert not signature.has_sequence
    sample = signature.sample(64)
    assert sample["x"].shape == sample["y"].shape == (64, 5)
    assert set(sample["y"].flatten().tolist()) == {3, 7}  # values that are known to be valid
    assert float(sample["x"].std()) == pytest.approx(float(examples["x"].std()), rel=0.5)


def test_factory_axes() -> None:
    examples = {"x": torch.randn(2, 5), "y": torch.randn(2, 5)}
    axes = {name: {0: "batch", 1: "sequence"} for name in examples}
    signature = factory_signature(Mixer(), examples, axes)
    assert signature.has_sequence
    assert signature.sample(3, 7)["x"].shape == (3, 7)
    assert signature.inputs[0] == Input(
        "x", "example", ((0, "batch"), (1, "sequence")), (2, 5), "float32"
    )


def test_module_without_tensors_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[()]:
            return ()

    with pytest.raises(ModelError, match="returns no tensor"):
        named_outputs(Silent(), {"x": torch.ones(1)})
