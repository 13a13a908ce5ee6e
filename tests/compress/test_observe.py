import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from calib_data.errors import ModelError, TrainingError
from compress.checkpoint import Checkpoint
from compress.observe import Observed, observe, stacks
from tests.compress.test_prune import apply_plan, random_plan
from tests.tiny import FAMILIES, student_from_layers, tiny_batches, tiny_checkpoint

ALL = frozenset({"outputs", "layers", "attention", "embeddings"})
SEQ2SEQ = ("bart", "marian", "t5")
HIDDEN_ATTENTION = ("deberta-v2", "mpnet")
SEEN = [f for f in (*FAMILIES, "marian") if f not in HIDDEN_ATTENTION]


def make(family: str, **changes: object) -> Checkpoint:
    task = "text2text-generation" if family in SEQ2SEQ else "feature-extraction"
    if family == "t5":
        changes["decoder_start_token_id"] = 0
    return tiny_checkpoint(family, task, **changes)


def batch_for(checkpoint: Checkpoint, ragged: bool = True) -> dict[str, Tensor]:
    batch = checkpoint.signature.sample(3, 6, ragged=ragged)
    if "decoder_input_ids" in batch:
        batch["labels"] = batch.pop("decoder_input_ids").clone()
        batch["labels"][0, 4:] = -100
    return batch


@pytest.mark.parametrize("family", SEEN)
def test_what_is_seen_is_what_transformers_tells(family: str) -> None:
    checkpoint = make(family)
    batch = batch_for(checkpoint)
    with torch.no_grad():
        seen = observe(checkpoint, batch, ALL)
        plain = observe(checkpoint, batch, frozenset({"outputs"}))
    assert (plain.layers, plain.attention, plain.embeddings) == ([], [], [])
    for name, value in plain.outputs.items():
        assert value.equal(seen.outputs[name]), name  # looking changes no bit
    inputs = {k: v for k, v in batch.items() if k in checkpoint.signature.names or k == "labels"}
    with torch.no_grad():
        told = checkpoint.backbone(**inputs, output_hidden_states=True, return_dict=True)
    if family in SEQ2SEQ:
        lists = [told.encoder_hidden_states, told.decoder_hidden_states]
    else:
        lists = [told.hidden_states]
    half = len(seen.layers) // len(lists)
    assert len(seen.layers) == len(seen.attention) == 2 * len(lists)
    for number, states in enumerate(lists):
        mine = [seen.embeddings[number], *seen.layers[number * half : (number + 1) * half]]
        # some add a last norm to what the last layer returns
        for one, other in zip(mine[:-1], states[:-1]):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["bart", "bert", "gpt2", "llama", "t5", "vit"])
def test_attention_maps_are_those_of_the_eager_implementation(family: str) -> None:
    checkpoint = make(family)
    batch = batch_for(checkpoint)
    with torch.no_grad():
        seen = observe(checkpoint, batch, ALL)
        checkpoint.backbone.set_attn_implementation("eager")
        inputs = {
            k: v for k, v in batch.items() if k in checkpoint.signature.names or k == "labels"
        }
        told = checkpoint.backbone(**inputs, output_attentions=True, return_dict=True)
    both = family in SEQ2SEQ
    expected = [*told.encoder_attentions, *told.decoder_attentions] if both else told.attentions
    mask = batch.get("attention_mask")
    for item, maps in zip(seen.attention, expected, strict=True):
        mine = item.maps()
        assert mine.sum(-1).allclose(torch.ones(()))
        real = slice(None) if mask is None or len(mine[0, 0]) != mask.shape[1] else mask.bool()
        mine, maps = mine.transpose(1, 2), maps.transpose(1, 2)  # (B, T, H, T)
        torch.testing.assert_close(mine[real], maps[real], atol=1e-6, rtol=1e-4)


def test_grouped_softcapped_and_flash_masks_are_understood() -> None:
    checkpoint = make("llama")
    batch = checkpoint.signature.sample(2, 6)
    with torch.no_grad():
        item = observe(checkpoint, batch, ALL).attention[0]
    assert item.key.shape[1] == 2
    assert item.query.shape[1] == 4
    padding = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    flash = dataclasses.replace(item, mask=padding, causal=True)
    torch.testing.assert_close(flash.maps(), item.maps())
    free = dataclasses.replace(item, mask=None, causal=False)
    assert free.maps()[0, 0, 0, 5] > 0
    capped = dataclasses.replace(free, softcap=1e-6)
    torch.testing.assert_close(capped.maps(), torch.full((2, 4, 6, 6), 1 / 6))


@pytest.mark.parametrize("family", HIDDEN_ATTENTION)
def test_attention_off_the_interface_is_an_error_that_names_what_works(family: str) -> None:
    checkpoint = make(family)
    batch = batch_for(checkpoint)
    before = AttentionInterface.get_interface
    with pytest.raises(ModelError, match="use hidden"):
        observe(checkpoint, batch, ALL)
    assert AttentionInterface.get_interface is before
    assert len(observe(checkpoint, batch, frozenset({"layers"})).layers) == 2


def test_only_the_observed_model_is_recorded_and_nothing_stays() -> None:
    teacher, student = make("bert", num_hidden_layers=4), make("bert", seed=1)
    batch = batch_for(teacher)
    before = AttentionInterface.get_interface
    handle = teacher.backbone.register_forward_pre_hook(
        lambda *_: [student.forward(batch), None][1]  # another model runs meanwhile
    )
    seen = observe(teacher, batch, ALL)
    handle.remove()
    assert len(seen.attention) == 4
    assert AttentionInterface.get_interface is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.backbone.modules())


def test_pruned_models_and_some_of_the_layers_are_seen() -> None:
    whole = make("bert", num_hidden_layers=4)
    pruned = apply_plan(whole, random_plan(whole))
    student = student_from_layers(pruned, [0, 3])
    seen = observe(student, next(iter(tiny_batches())), ALL)
    heads = [item.query.shape[1] for item in seen.attention]
    assert len(heads) == 2
    assert any(count < 4 for count in heads)


def gradients(checkpoint: Checkpoint, batch: dict[str, Tensor]) -> list[Tensor]:
    checkpoint.backbone.zero_grad()
    seen = observe(checkpoint, batch, ALL)
    total = sum(x.square().mean() for x in seen.layers)
    total = total + sum(x.maps().square().mean() + x.value.square().mean() for x in seen.attention)
    total.backward()
    return [p.grad.clone() for p in checkpoint.backbone.parameters() if p.grad is not None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_are_the_same_under_gradient_checkpointing(implementation: str) -> None:
    checkpoint = make("bert")
    checkpoint.backbone.set_attn_implementation(implementation)
    batch = batch_for(checkpoint)
    plain = gradients(checkpoint, batch)
    assert len(plain) > 20
    checkpoint.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint.backbone.train()
    for module in checkpoint.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for one, other in zip(plain, gradients(checkpoint, batch), strict=True):
        torch.testing.assert_close(one, other)


def test_reentrant_checkpointing_is_refused_as_it_hides_gradients() -> None:
    checkpoint = make("bert")
    checkpoint.backbone.gradient_checkpointing_enable({"use_reentrant": True})
    checkpoint.backbone.train()
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        observe(checkpoint, batch_for(checkpoint), ALL)


def test_two_stacks_have_units_of_their_own() -> None:
    found = stacks(make("t5").backbone)
    assert [(s.name, s.unit) for s in found] == [
        ("encoder.block", "tokens"),
        ("decoder.block", "labels"),
    ]
    assert [s.unit for s in stacks(make("gpt2").backbone)] == ["tokens"]


def test_seq2seq_without_targets_is_an_error() -> None:
    checkpoint = make("bart")
    batch = checkpoint.signature.sample(2, 6)
    del batch["decoder_input_ids"]
    with pytest.raises(ModelError, match="columns text and text_pair"):
        observe(checkpoint, batch, frozenset({"outputs"}))
    t5 = tiny_checkpoint("t5", "text2text-generation")
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        observe(t5, batch | {"labels": batch["input_ids"]}, frozenset({"outputs"}))


def test_nothing_is_seen_unless_asked_for() -> None:
    checkpoint = make("bert")
    assert observe(checkpoint, batch_for(checkpoint), frozenset()) == Observed()
