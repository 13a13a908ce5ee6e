"""Adapters: what they train, that they save and merge without a difference, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib_data.errors import ConfigError, ModelError
from compress.adapter_plan import MERGEABLE, SETTINGS, AdapterConfig
from compress.adapters import add_adapter, merge, merge_adapter
from compress.checkpoint import Checkpoint, weights_sha256
from compress.distill import DistillConfig, distill
from compress.files import read_json, write_json
from compress.loading import open_checkpoint
from compress.prune import PruneConfig, prune
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from tests.tiny import student_from_layers, tiny_batches, tiny_checkpoint, write

IDS = torch.arange(5, 40).unsqueeze(0)
CLASSIFIER, DECODER = "text-classification", "text-generation"
TAKEN = [
    *(("bert", CLASSIFIER, method) for method in SETTINGS),
    *(("gpt2", DECODER, method) for method in SETTINGS),
    *(("llama", DECODER, method) for method in SETTINGS),
    ("opt", DECODER, "prefix"),
    ("t5", "text2text-generation", "lora"),
    ("t5", "text2text-generation", "adapter"),
    ("albert", CLASSIFIER, "lora"),
    ("deberta-v2", CLASSIFIER, "ia3"),
    ("vit", "image-classification", "lora"),
    ("vit", "image-classification", "adapter"),
]


def adapted(family: str, task: str, method: str, **settings: Any) -> Checkpoint:
    """Return a tiny model with an adapter, whose weights are moved away from where they start."""
    if method == "prefix":
        settings.setdefault("virtual_tokens", 4)
    made = add_adapter(tiny_checkpoint(family, task), AdapterConfig(method, **settings), IDS)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return made


def answer(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.predict(checkpoint.signature.sample(2, 8, ragged=True))["logits"]


@pytest.mark.parametrize(("family", "task", "method"), TAKEN)
def test_it_answers_differently_and_reloads_equal(
    family: str, task: str, method: str, tmp_path: Path
) -> None:
    made, source = adapted(family, task, method), tiny_checkpoint(family, task)
    assert np.abs(answer(made) - answer(source)).max() > 1e-3
    again = open_checkpoint(write(made, tmp_path / "saved"))
    np.testing.assert_array_equal(answer(again), answer(made))
    assert again.adapters == made.adapters
    assert again.signature == made.signature


@pytest.mark.parametrize("method", [m for m in SETTINGS if m != "prefix"])
def test_it_starts_without_a_change(method: str) -> None:
    source = tiny_checkpoint("bert", CLASSIFIER)
    before = weights_sha256(source.module)
    made = add_adapter(source, AdapterConfig(method))
    np.testing.assert_array_equal(answer(made), answer(source))
    assert weights_sha256(source.module) == before
    assert source.adapters is None


def test_only_the_adapter_and_the_head_are_trained() -> None:
    for method in SETTINGS:
        model: Any = add_adapter(tiny_checkpoint("bert", CLASSIFIER), AdapterConfig(method), IDS)
        names = [n for n, p in model.module.named_parameters() if p.requires_grad]
        own = {"lora": "lora_", "ia3": "ia3_l", "prefix": "prefix_encoder", "adapter": ""}[method]
        assert all(own in name or name.startswith("classifier.") for name in names), method
        assert "classifier.weight" in names
        assert "bert.embeddings.word_embeddings.weight" not in names
    model = add_adapter(tiny_checkpoint("gpt2", DECODER), AdapterConfig("lora"))
    trained = [n for n, p in model.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)  # no head: it is the embedding


def test_what_is_fresh_is_trained_whole() -> None:
    fresh = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    made = add_adapter(tiny_checkpoint("bert", CLASSIFIER), AdapterConfig("lora"), fresh=fresh)
    trained = {n for n, p in made.module.named_parameters() if p.requires_grad}
    assert set(fresh) <= trained
    assert "bert.pooler.dense" not in (made.adapters or {})["modules"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "albert", "deberta-v2"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_equals_unmerged(family: str, method: str, tmp_path: Path) -> None:
    task = {"gpt2": DECODER, "t5": "text2text-generation"}.get(family, CLASSIFIER)
    made = adapted(family, task, method)
    merged = merge_adapter(made)
    difference = np.abs(answer(merged) - answer(made)).max()
    assert difference < 1e-5 * np.abs(answer(made)).max()
    assert np.abs(answer(tiny_checkpoint(family, task)) - answer(made)).max() > 100 * difference
    source = tiny_checkpoint(family, task)
    assert list(merged.module.state_dict()) == list(source.module.state_dict())
    again = open_checkpoint(write(merged, tmp_path / "merged"))
    np.testing.assert_array_equal(answer(again), answer(merged))
    assert "adapters" not in read_json(tmp_path / "merged" / "onnxpress.json")


def test_merging_is_a_stage_in_the_lineage() -> None:
    result = merge(adapted("bert", CLASSIFIER, "lora"))
    assert result.checkpoint.lineage[-1]["stage"] == "merge"
    assert result.report["method"] == "lora"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: merge(tiny_checkpoint("bert")), "has no adapter"),
        (lambda: merge(adapted("bert", CLASSIFIER, "adapter")), "only lora and ia3"),
        (lambda: merge(adapted("gpt2", DECODER, "prefix")), "only lora and ia3"),
        (lambda: adapted("t5", "text2text-generation", "prefix"), "takes no prefix: it is an enc"),
        (lambda: adapted("albert", CLASSIFIER, "prefix"), "takes no prefix: it reads no cache"),
        (lambda: adapted("vit", "image-classification", "prefix"), "reads no text"),
    ],
)
def test_methods_that_do_not_fit_the_model(make: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unmerged_adapters_are_refused_with_a_cure() -> None:
    plain, batches = tiny_checkpoint("bert", CLASSIFIER), tiny_batches()
    for method, cure in (("lora", "onnxpress compress merge"), ("adapter", "then fine-tune it")):
        made = adapted("bert", CLASSIFIER, method)
        for stage in (
            lambda made=made: quantize(made, QuantizeConfig()),
            lambda made=made: prune(made, batches, PruneConfig()),
            lambda made=made: distill(plain, made, batches, DistillConfig()),
            lambda made=made: student_from_layers(made, [0]),
        ):
            with pytest.raises(ModelError, match=cure):
                stage()
    quantize(merge_adapter(adapted("bert", CLASSIFIER, "lora")), QuantizeConfig())


def test_targets_choose_layers() -> None:
    made = adapted("bert", CLASSIFIER, "lora", targets=("query", "*.layer.1.*.value"))
    names = (made.adapters or {})["modules"]
    assert [name.rpartition(".")[2] for name in names] == ["query", "query", "value"]
    with pytest.raises(ConfigError, match=r"names end in .*query"):
        adapted("bert", CLASSIFIER, "lora", targets=("q_proj",))


def test_pfeiffer_adapts_the_feed_forward_alone() -> None:
    houlsby = adapted("bert", CLASSIFIER, "adapter").adapters or {}
    pfeiffer = adapted("bert", CLASSIFIER, "adapter", placement="pfeiffer").adapters or {}
    assert len(houlsby["modules"]) == 4
    assert [n for n in houlsby["modules"] if "attention" not in n] == pfeiffer["modules"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "knit"}, "--method must be one of"),
        ({"method": "lora", "rank": 0}, "--rank must be at least 1"),
        ({"method": "lora", "alpha": 0.0}, "--alpha"),
        ({"method": "lora", "lora_dropout": 1.0}, "--lora-dropout"),
        ({"method": "lora", "virtual_tokens": 4}, "lora has no --virtual-tokens"),
        ({"method": "prefix", "targets": ("query",)}, "prefix has no --targets"),
        ({"method": "adapter", "placement": "here"}, "--placement"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        AdapterConfig(**settings)


@pytest.mark.parametrize("method", SETTINGS)
def test_settings_round_trip(method: str) -> None:
    config = AdapterConfig(method)
    assert AdapterConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("lora", {"method": "knit"}, "knows lora"),
        ("lora", {"modules": ["bert.nowhere"]}, "no linear layer"),
        ("lora", {"modules": "bert"}, "list of names"),
        ("lora", {"rank": -1}, "rank is -1"),
        ("lora", {"rank": 3}, "wrong shape"),
        ("lora", {"alpha": "1"}, "alpha"),
        ("adapter", {"bottleneck": True}, "bottleneck is True"),
        ("prefix", {"heads": 3}, "does not fit"),
        ("prefix", {"virtual_tokens": 3}, "wrong shape"),
    ],
)
def test_damaged_manifests_are_refused(
    method: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = write(adapted("bert", CLASSIFIER, method), tmp_path / "saved") / "onnxpress.json"
    manifest = read_json(path)
    manifest["adapters"] |= changes
    write_json(path, manifest)
    with pytest.raises(ModelError, match=told):
        open_checkpoint(tmp_path / "saved")


def test_a_prefix_uses_up_positions() -> None:
    source = tiny_checkpoint("gpt2", DECODER)
    assert adapted("gpt2", DECODER, "prefix").signature.longest == source.signature.longest - 4
    with pytest.raises(ConfigError, match="leave nothing of the model's 64"):
        adapted("gpt2", DECODER, "prefix", virtual_tokens=64)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_prefix_of_real_text_is_that_text(family: str) -> None:
    source = tiny_checkpoint(family, DECODER)
    made = add_adapter(source, AdapterConfig("prefix", virtual_tokens=6), IDS)
    rest = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rest)
    mask[1, 5:] = 0
    whole = torch.cat([IDS[:, :6].expand(2, -1), rest], dim=1)
    long = torch.cat([torch.ones((2, 6), dtype=torch.long), mask], dim=1)
    expected = source.predict({"input_ids": whole, "attention_mask": long})["logits"][:, 6:]
    found = made.predict({"input_ids": rest, "attention_mask": mask})["logits"]
    real = mask.numpy() == 1
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def test_a_prefix_serves_generation_with_a_cache() -> None:
    made = adapted("llama", DECODER, "prefix")
    model: Any = made.module
    ids = IDS[:, :5]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with_cache = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    without = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert with_cache.tolist() == without.tolist()
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert cache.get_seq_length() == 5  # the caller's own, without the prefix
