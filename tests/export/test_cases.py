from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.signature import Signature
from compress.tokens import row_alone, tokens_of
from export import cases
from export.cases import padded_row, parity_cases
from export.parts import parts
from tests.export.graphs import checkpoint_of


def decoder() -> Checkpoint:
    return parts(checkpoint_of("gpt2"))["model"]


def shapes_of(part: Checkpoint, **settings: bool) -> set[tuple[int, int, int]]:
    """Return (batch, sequence, past) of every case."""
    found = set()
    for case in dict(parity_cases(part, **settings)).values():
        past = case["past_key_values.0.key"].shape[2] if part.signature.has_past else 0
        found.add((*case["input_ids"].shape, past))
    return found


def test_batches_and_lengths() -> None:
    every = dict(parity_cases(checkpoint_of("bert")))
    shapes = shapes_of(checkpoint_of("bert"))
    assert {b for b, _, _ in shapes} == {1, 2, 3, 8}
    assert {1, 2, 11, 12, 32, 64} <= {s for _, s, _ in shapes}
    assert any(not case["attention_mask"].all() for case in every.values())
    assert "real text" in every
    images = dict(parity_cases(checkpoint_of("vit"))).values()
    assert {len(case["pixel_values"]) for case in images} == {1, 3, 8}


def test_decoders_have_prompts_steps_and_chunks() -> None:
    part = decoder()
    shapes = shapes_of(part)
    assert {1, 2, 11, 12, 32} <= {s for _, s, past in shapes if not past}
    assert {(1, 1, 1), (3, 1, 5), (8, 1, 11), (1, 1, 63), (1, 3, 5), (3, 3, 5)} <= shapes
    assert (3, 3, 5) not in shapes_of(part, batched_chunks=False)
    text = dict(parity_cases(part))["real text"]
    mask = text["attention_mask"]
    assert mask[:, -1].all()  # padded on the left
    assert not mask[:, 0].all()
    assert torch.equal(text["input_ids"] == part.signature.pad, mask == 0)
    assert torch.equal(text["position_ids"][mask.sum(1) < mask.shape[1]][:, 0].unique(),
                       torch.tensor([0]))  # fmt: skip


def test_longest_is_there_where_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    part = checkpoint_of("bert")
    monkeypatch.setattr(cases, "_PRODUCTS", 0)
    assert {(b, s) for b, s, _ in shapes_of(part)} == {(1, 64), (8, 64)}  # and the real text
    monkeypatch.setattr(cases, "MOST", 20)
    assert max(s for _, s, _ in shapes_of(part)) == 20


def test_large_outputs_make_fewer_tokens_but_not_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits over a large vocabulary would be many times the model in memory."""
    part = decoder()
    monkeypatch.setattr(cases, "_NUMBERS", 1)
    few = shapes_of(part)
    assert (1, 1, 63) not in few
    assert max(past for _, _, past in few) < 63
    assert sum(b * s for b, s, _ in few) < sum(
        b * s for b, s, _ in shapes_of(checkpoint_of("bert"))
    )


def test_both_sides_of_a_switch_are_met() -> None:
    assert {(2, 40, 0), (2, 41, 0)} <= {
        (*case["input_ids"].shape, 0)
        for case in dict(parity_cases(checkpoint_of("bert"), switches=[41])).values()
    }
    found = {
        case["past_key_values.0.key"].shape[2]
        for name, case in dict(parity_cases(decoder(), switches=[41])).items()
        if name.startswith("both sides")
    }
    assert found == {39, 40}


def test_inputs_have_the_dtype_of_the_signature() -> None:
    part = decoder()
    inputs = tuple(
        replace(item, dtype="float16") if item.kind == "past" else item
        for item in part.signature.inputs
    )
    half = replace(part, signature=replace(part.signature, inputs=inputs))
    for case in dict(parity_cases(half)).values():
        assert case["past_key_values.0.key"].dtype == torch.float16
        assert case["input_ids"].dtype == torch.int64


def test_what_belongs_to_real_tokens() -> None:
    part = decoder()
    tokens = tokens_of(part)
    assert tokens.mask == "attention_mask"
    assert tokens.axes["logits"] == 1
    assert tokens.axes["present.1.value"] == 2
    case = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    logits = np.arange(12.0).reshape(2, 2, 3)  # of the last two tokens
    assert tokens.real("logits", logits, case) is logits
    present = np.arange(24.0).reshape(2, 2, 3, 2)
    kept = tokens.real("present.0.key", present, case)
    assert kept.shape == (5, 2, 2)
    assert np.array_equal(kept[0], present[0, :, 1])
    assert tokens.row("present.0.key", present, case, 0).shape == (1, 2, 2, 2)


def test_labels_are_no_tokens() -> None:
    part = checkpoint_of("classifier")
    assert tokens_of(part).axes == {}
    assert tokens_of(checkpoint_of("vit")).mask is None


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_row_alone_is_the_row_without_padding(name: str) -> None:
    part = parts(checkpoint_of(name))["model"]
    every = dict(parity_cases(part))
    found = padded_row(every, part)
    assert found is not None
    case, row = every[found[0]], found[1]
    alone = row_alone(case, part, row)
    real = case["attention_mask"][row].bool()
    assert torch.equal(alone["input_ids"][0], case["input_ids"][row][real])
    assert alone["attention_mask"].all()
    assert len(alone["attention_mask"]) == 1
    tokens = tokens_of(part)
    padded, one = part.predict(case), part.predict(alone)
    for output in part.signature.outputs:
        kept = tokens.row(output, padded[output], case, row)
        np.testing.assert_allclose(kept, one[output], rtol=1e-3, atol=1e-5)


def test_nothing_is_padded_without_a_mask() -> None:
    part = checkpoint_of("vit")
    assert padded_row(dict(parity_cases(part)), part) is None
    plain = Signature(inputs=(), outputs=())
    assert padded_row({}, replace(part, signature=plain)) is None
