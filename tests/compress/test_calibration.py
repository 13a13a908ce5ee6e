from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress.calibration_state
from calib_data.batches import Batches
from calib_data.errors import ConfigError, DataError, DestinationError, ModelError
from calib_data.objectives import Translation
from calib_data.sources import Examples
from compress.calibration import Calibration, InputStats, calibrate
from compress.checkpoint import Checkpoint, weights_sha256
from compress.layer_inputs import watching
from compress.loading import open_checkpoint
from compress.quantize import quantize
from compress.quantize_config import SCHEME_SETTINGS, QuantizeConfig
from tests.tiny import SENTENCES, SampledBatches, tiny_batches, tiny_checkpoint, tiny_tokenizer


class Some:
    """These batches."""

    def __init__(self, batches: Iterable[dict[str, Tensor]], fingerprint: str = "some") -> None:
        self._batches, self.fingerprint = list(batches), fingerprint

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._batches)


class Killed(Exception):
    """What ends a run in the middle."""


class Cut(Some):
    """The first of these batches, and then the end of the run."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self._batches[:3]
        raise Killed


def layers(checkpoint: Checkpoint) -> list[str]:
    kinds = ("Linear", "Conv1D")
    return [n for n, m in checkpoint.backbone.named_modules() if type(m).__name__ in kinds]


def seen(checkpoint: Checkpoint, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all vectors that came into each layer, those of padding too."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers(checkpoint)}

    def keep(name: str, x: Tensor) -> None:
        found[name].append(x.detach().flatten(0, -2).clone())

    with watching(checkpoint, found, keep), torch.no_grad():
        for batch in batches:
            checkpoint.forward(batch)
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def check(stats: InputStats, x: Tensor) -> None:
    """Fail where `stats` are not those of the vectors x, but for rounding."""
    assert stats.count == len(x)
    assert stats.histogram.count == x.numel()
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.tensor(stats.low), x.min(), **near)
    torch.testing.assert_close(torch.tensor(stats.high), x.max(), **near)
    torch.testing.assert_close(stats.channel_max, x.abs().amax(0), **near)
    torch.testing.assert_close(stats.channel_mean, x.double().mean(0), **near)
    if stats.moment is not None:
        torch.testing.assert_close(stats.moment, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def same(one: Calibration, other: Calibration) -> bool:
    """Whether they are equal, bit by bit."""
    pairs = [(stats, other.inputs[name]) for name, stats in one.inputs.items()]
    return (
        one.inputs.keys() == other.inputs.keys()
        and one.samples == other.samples
        and all(
            a.histogram.counts.equal(b.histogram.counts)
            and (a.low, a.high, a.count) == (b.low, b.high, b.count)
            and a.channel_max.equal(b.channel_max)
            and a.channel_mean.equal(b.channel_mean)
            and (a.moment is None or (b.moment is not None and a.moment.equal(b.moment)))
            for a, b in pairs
        )
    )


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("family", ["albert", "bert", "deberta-v2", "gpt2", "phi", "swin", "vit"])
def test_statistics_are_those_of_all_inputs(family: str, moments: bool) -> None:
    checkpoint = tiny_checkpoint(family)
    batches = Some(checkpoint.signature.sample(4, 9, seed=seed) for seed in range(3))
    expected = seen(checkpoint, batches)
    made = calibrate(checkpoint, layers(checkpoint), batches, moments=moments)
    assert made.inputs.keys() == expected.keys()
    assert (made.samples, made.unseen, made.fingerprint) == (12, (), "some")
    for name, stats in made.inputs.items():
        assert (stats.moment is not None) == moments
        # a tensor that comes into a layer twice is one tensor: DeBERTa's positions do not change
        check(stats, expected[name])


@pytest.mark.parametrize(
    "family", ["albert", "bart", "bert", "clip_text_model", "deberta-v2", "gpt2", "llama", "mpnet",
               "opt", "t5"]
)  # fmt: skip
def test_padding_does_not_count(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    ragged = checkpoint.signature.sample(4, 9, seed=1, ragged=True)
    lengths = ragged["attention_mask"].sum(1).tolist()
    assert min(lengths) < 9
    answers = ragged.get("decoder_input_ids")
    if answers is not None:  # as long as the texts, so that shapes alone do not tell them apart
        assert answers.shape == ragged["attention_mask"].shape
        real = torch.arange(9) < torch.tensor([[3], [9], [1], [5]])
        ragged["decoder_attention_mask"] = real.long()
    alone = []
    for row, length in enumerate(lengths):
        one = {name: value[row : row + 1, :length] for name, value in ragged.items()}
        if answers is not None:
            count = int(ragged["decoder_attention_mask"][row].sum())
            one["decoder_input_ids"] = answers[row : row + 1, :count]
        alone.append(one)
    made = calibrate(checkpoint, layers(checkpoint), Some([ragged]))
    expected = seen(checkpoint, alone)
    for name, stats in made.inputs.items():
        x = expected[name]
        if family == "deberta-v2" and stats.count != len(x):
            assert name.endswith(("query_proj", "key_proj"))  # positions, of four texts or of one
            assert stats.count == sum(lengths) + 128
            continue
        check(stats, x)


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_padding_would_show(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    ragged = checkpoint.signature.sample(4, 9, seed=1, ragged=True)
    name = layers(checkpoint)[0]
    whole = {**ragged, "attention_mask": torch.ones_like(ragged["attention_mask"])}
    counts = [
        calibrate(checkpoint, [name], Some([batch])).inputs[name].count for batch in (ragged, whole)
    ]
    assert counts == [int(ragged["attention_mask"].sum()), 36]


def test_answers_without_a_mask_go_by_their_labels() -> None:
    import datasets

    checkpoint = tiny_checkpoint("bart")
    pairs = {"text": SENTENCES[:8], "text_pair": SENTENCES[1:9]}
    batches = Batches(
        Examples(datasets.Dataset.from_dict(pairs), "pairs"),
        tiny_tokenizer(),
        batch_size=4,
        objective=Translation(0),
    )
    made = calibrate(checkpoint, layers(checkpoint), batches).inputs
    batch = list(batches)
    assert made["decoder.layers.0.fc1"].count == sum(int((b["labels"] >= 0).sum()) for b in batch)
    texts = sum(int(b["attention_mask"].sum()) for b in batch)
    assert made["encoder.layers.0.fc1"].count == texts
    assert made["decoder.layers.0.encoder_attn.k_proj"].count == texts
    assert any(not b["labels"].ge(0).all() for b in batch)


class Flat(nn.Module):
    """Layers on tokens one after another (B × T), on patches (B, 9), and on whole texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8)
        self.patches = nn.Parameter(torch.randn(9, 8))
        self.on_tokens, self.on_patches, self.on_texts = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        flat = self.on_tokens(x.flatten(0, 1)).view(x.shape)
        patches = self.on_patches(self.patches.expand(len(x), 9, 8))
        pooled = (flat * attention_mask.unsqueeze(-1)).sum(1) + patches.sum(1)
        return self.on_texts(input=pooled)


def flat() -> object:
    example = torch.arange(18).reshape(2, 9)
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    return Flat(), {"input_ids": example, "attention_mask": torch.ones_like(example)}, axes


def test_layout_is_told_apart_from_shapes_that_fit_by_accident() -> None:
    checkpoint = open_checkpoint("tests.compress.test_calibration:flat")
    mask = torch.arange(9) < torch.tensor([[4], [9], [2]])
    batch = {"input_ids": torch.arange(27).view(3, 9), "attention_mask": mask.long()}
    made = calibrate(checkpoint, ["on_tokens", "on_patches", "on_texts"], Some([batch])).inputs
    # as many patches as tokens, and none of them padding
    assert [made[name].count for name in made] == [15, 27, 3]


class Rerouted(nn.Module):
    """One tensor for two layers, changed before it goes to the second; a third that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.first(x) + self.third(x)
        return y + self.second(x.mul_(100)) + (self.never(x) if len(x) == 2 else 0)


def rerouted() -> object:
    return Rerouted(), {"x": torch.randn(1, 4)}


def test_tensor_is_counted_once_for_all_its_layers() -> None:
    made = calibrate(
        open_checkpoint("tests.compress.test_calibration:rerouted"),
        ["first", "second", "third"],
        Some([{"x": torch.ones(3, 4)}]),
    ).inputs
    assert made["first"] is made["third"]
    assert made["first"] is not made["second"]  # written to in between
    assert (made["first"].high, made["second"].high) == (1, 100)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("bert", [("query", "key", "value")]),
        ("llama", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("phi", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")]),
        ("albert", [("query", "key", "value")]),
        ("t5", [("SelfAttention.q", "SelfAttention.k", "SelfAttention.v")]),
    ],
)
def test_layers_of_one_tensor_share_their_statistics(
    family: str, groups: list[tuple[str, ...]]
) -> None:
    checkpoint = tiny_checkpoint(family)
    inputs = calibrate(checkpoint, layers(checkpoint), SampledBatches(checkpoint)).inputs
    for group in groups:
        for name in inputs:
            if not name.endswith(group[0]):
                continue
            others = [name.removesuffix(group[0]) + last for last in group]
            assert len({id(inputs[other]) for other in others}) == 1
            assert sum(stats is inputs[name] for stats in inputs.values()) == len(group)


def test_answers_share_what_they_attend_to() -> None:
    checkpoint = tiny_checkpoint("bart")
    inputs = calibrate(checkpoint, layers(checkpoint), SampledBatches(checkpoint)).inputs
    keys = [f"decoder.layers.{i}.encoder_attn.{x}_proj" for i in (0, 1) for x in "kv"]
    assert len({id(inputs[key]) for key in keys}) == 1


def test_model_is_left_as_it_was() -> None:
    checkpoint = tiny_checkpoint("bert")
    before = weights_sha256(checkpoint.module)
    with pytest.raises(Killed):
        calibrate(checkpoint, layers(checkpoint), Cut(SampledBatches(checkpoint)))
    calibrate(checkpoint, layers(checkpoint), SampledBatches(checkpoint))
    assert weights_sha256(checkpoint.module) == before
    assert not any(module._forward_pre_hooks for module in checkpoint.module.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint("bert")
    names, batches = layers(checkpoint), SampledBatches(checkpoint)
    found = calibrate(checkpoint, names, batches, moments=True)
    assert {value.device.type for value in checkpoint.module.state_dict().values()} == {"cpu"}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    expected = calibrate(checkpoint, names, batches, moments=True)
    for name, stats in expected.inputs.items():
        theirs = found.inputs[name]
        assert (stats.count, stats.histogram.count) == (theirs.count, theirs.histogram.count)
        for field in ("channel_max", "channel_mean", "moment"):
            torch.testing.assert_close(
                getattr(stats, field), getattr(theirs, field), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_killed_run_goes_on_to_the_same_bits(
    family: str, moments: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress.calibration_state, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(compress.calibration_state, "_SHARE", 1e9)
    checkpoint = tiny_checkpoint(family)
    names, batches = layers(checkpoint), Some(SampledBatches(checkpoint, count=5))
    whole = calibrate(checkpoint, names, batches, moments=moments)
    state = tmp_path / "state"
    with pytest.raises(Killed):
        calibrate(checkpoint, names, Cut(batches), moments=moments, state=state)
    assert sorted(path.name for path in state.glob("step-*")) == ["step-00000002", "step-00000003"]
    ran = []
    with watching(checkpoint, names[:1], lambda name, _: ran.append(name)):
        resumed = calibrate(checkpoint, names, batches, moments=moments, state=state)
    assert same(resumed, whole)
    per_run = 2 if family == "albert" else 1
    assert len(ran) <= per_run * (2 + 2)  # the two batches left, and two runs for the layouts
    assert not state.exists()


def test_state_of_other_data_or_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress.calibration_state, "SAVE_SECONDS", -1.0)
    checkpoint = tiny_checkpoint("bert")
    names, batches = layers(checkpoint), Some(SampledBatches(checkpoint, count=5))
    state = tmp_path / "state"
    with pytest.raises(Killed):
        calibrate(checkpoint, names, Cut(batches), state=state)
    with pytest.raises(ConfigError, match="data was some, is other"):
        calibrate(checkpoint, names, Some(batches, "other"), state=state)
    with pytest.raises(ConfigError, match="model was"):
        calibrate(tiny_checkpoint("bert", seed=1), names, batches, state=state)
    with pytest.raises(ConfigError, match="layers was"):
        calibrate(checkpoint, names[1:], batches, state=state)
    with pytest.raises(ConfigError, match="moments was False, is True"):
        calibrate(checkpoint, names, batches, moments=True, state=state)
    calibrate(checkpoint, names, batches, state=state)


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    checkpoint = tiny_checkpoint("bert")
    with pytest.raises(DestinationError, match=r"holds thesis\.txt and no calibration"):
        calibrate(checkpoint, layers(checkpoint), SampledBatches(checkpoint), state=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_no_batches_are_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    with pytest.raises(DataError, match="no calibration batch"):
        calibrate(checkpoint, layers(checkpoint), Some([]))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinite_input_is_refused_by_name(value: float) -> None:
    checkpoint = tiny_checkpoint("bert")
    checkpoint.module.encoder.layer[0].intermediate.dense.bias.data[3] = value
    with pytest.raises(ModelError, match=r"input of encoder\.layer\.0\.output\.dense is infinite"):
        calibrate(checkpoint, layers(checkpoint), SampledBatches(checkpoint))


def test_infinities_in_padding_do_not_matter() -> None:
    checkpoint = open_checkpoint("tests.compress.test_calibration:flat")
    checkpoint.module.table.weight.data[7] = torch.inf
    ids, mask = torch.tensor([[3, 7], [1, 2]]), torch.tensor([[1, 0], [1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    made = calibrate(checkpoint, ["on_tokens"], Some([batch]))
    assert made.inputs["on_tokens"].count == 3


def test_layer_that_never_ran_is_named() -> None:
    checkpoint = open_checkpoint("tests.compress.test_calibration:rerouted")
    batches = Some([{"x": torch.ones(3, 4)}])
    assert calibrate(checkpoint, ["first", "never"], batches).unseen == ("never",)
    with pytest.raises(ModelError, match=r"never ran during calibration.* --skip never"):
        quantize(checkpoint, QuantizeConfig("static"), batches)
    quantize(checkpoint, QuantizeConfig("static", skip=("never",)), batches)


def test_too_few_values_are_refused_by_layer() -> None:
    checkpoint = tiny_checkpoint("bert")
    with pytest.raises(DataError, match=r"^encoder\.layer\.0.*percentile of 99\.99 needs 20000"):
        quantize(
            checkpoint, QuantizeConfig("static", ranges="percentile"), SampledBatches(checkpoint)
        )


@pytest.mark.parametrize("ranges", SCHEME_SETTINGS["static"]["ranges"])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_input_can_be_quantized(ranges: str, value: float) -> None:
    checkpoint = open_checkpoint("tests.compress.test_calibration:rerouted")
    checkpoint.module.eval()
    batches = Some([{"x": torch.full((6000, 4), value)}])
    config = QuantizeConfig("static", skip=("never",), ranges=ranges)
    made = quantize(checkpoint, config, batches).checkpoint
    x = {"x": torch.full((5, 4), value)}
    expected, found = (c.predict(x) for c in (checkpoint, made))
    for name, y in expected.items():
        assert abs(y - found[name]).max() < 0.02 * (abs(y).max() + 0.1)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_lineage_tells_the_data_and_the_ranges(activations: str) -> None:
    checkpoint = tiny_checkpoint("bert")
    config = QuantizeConfig("static", activations=activations)
    batches = tiny_batches()
    entry = quantize(checkpoint, config, batches).checkpoint.lineage[-1]
    assert entry["data"] == batches.fingerprint
    assert entry["metrics"]["calibration_samples"] == 16
    made = calibrate(checkpoint, layers(checkpoint), batches)
    assert entry["ranges"] == made.ranges(config)
    for name, (low, high) in entry["ranges"].items():
        stats = made.inputs[name]
        largest = max(-stats.low, stats.high)
        if activations == "int8":
            assert -low == high <= largest
        else:
            assert stats.low <= low <= 0 <= high <= stats.high
