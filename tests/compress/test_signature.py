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


TOKENS = ((0, "batch"), (1, "sequence"))
PAST = Input("past", "past", ((0, "batch"), (2, "past_sequence")), (2, 4, 0, 8), "float32")


def test_samples_with_a_cache_are_padded_on_the_left() -> None:
    inputs = (
        Input("ids", "ids", TOKENS, (2, 16)),
        Input("mask", "mask", ((0, "batch"), (1, "total_sequence")), (2, 16)),
        Input("positions", "positions", TOKENS, (2, 16)),
        PAST,
    )
    signature = Signature(inputs, ("logits",), vocabulary=30, pad=3, longest=16)
    assert signature.has_past
    sample = signature.sample(8, 4, past=6, ragged=True)
    assert sample["past"].shape == (8, 4, 6, 8)
    mask = sample["mask"]
    assert mask.shape == (8, 10)
    assert bool((mask.diff(dim=1) >= 0).all())
    assert bool(mask[:, -1].all())
    assert bool((sample["ids"] == 3).equal(mask[:, 6:] == 0))
    assert sample["positions"].equal((mask.cumsum(dim=1) - 1).clamp(min=0)[:, 6:])
    assert signature.sample(1, 4)["past"].shape == (1, 4, 0, 8)
    signature.sample(1, 4, past=12)
    with pytest.raises(ConfigError, match="a sequence of 17 is longer"):
        signature.sample(1, 4, past=13)


def test_samples_of_a_decoder_beside_an_encoder() -> None:
    of_encoder = ((0, "batch"), (1, "encoder_sequence"))
    inputs = (
        Input("mask", "mask", of_encoder, (2, 16)),
        Input("ids", "ids", TOKENS, (2, 16)),
        Input("states", "hidden", of_encoder, (2, 16, 12), "float32"),
        PAST,
        Input("flag", "flag", (), (1,), "bool"),
    )
    signature = Signature(inputs, ("logits",), vocabulary=30, longest=6)
    for sequence, past, encoder in ((1, 0, 4), (3, 2, 5), (6, 0, 6)):
        sample = signature.sample(3, sequence, past=past, ragged=True)
        assert sample["ids"].shape == (3, sequence)
        assert bool((sample["ids"] != 0).all())  # no mask of the decoder's own
        assert sample["mask"].shape == (3, encoder)
        assert sample["states"].shape == (3, encoder, 12)
        assert sample["flag"].tolist() == [past > 0]


def test_ragged_samples_of_two_towers_hold_another_number_of_images() -> None:
    inputs = (
        Input("ids", "ids", ((0, "text_batch_size"), (1, "sequence")), (2, 16)),
        Input("pixels", "pixels", ((0, "image_batch_size"),), (2, 3, 4, 4), "float32"),
    )
    signature = Signature(inputs, ("logits",), vocabulary=30)
    for ragged, images in ((False, 3), (True, 4)):
        sample = signature.sample(3, 5, ragged=ragged)
        assert sample["ids"].shape == (3, 5)
        assert sample["pixels"].shape == (images, 3, 4, 4)


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


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"z": {0: "batch"}}, "axes are named for z, and the inputs are x, y"),
        ({"x": {2: "width"}}, "x has 2 axes, and axis 2 is named"),
        ({"x": {-1: "width"}}, "axis -1"),
    ],
)
def test_axes_that_are_not_there_are_refused(axes: dict, message: str) -> None:
    examples = {"x": torch.randn(2, 5), "y": torch.randn(2, 5)}
    with pytest.raises(ModelError, match=message):
        factory_signature(Mixer(), examples, axes)


def test_module_without_tensors_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[()]:
            return ()

    with pytest.raises(ModelError, match="returns no tensor"):
        named_outputs(Silent(), {"x": torch.ones(1)})
