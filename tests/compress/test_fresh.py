import pytest
import torch
from torch import nn
from transformers import BigBirdConfig, BigBirdModel

from calib_data.errors import ModelError
from compress.fresh import unchanged


def test_bigbird_answers_long_texts_as_a_fresh_model_after_a_short_one() -> None:
    """Its forward drops the sparse attention at the first text too short for it, for good."""
    config = BigBirdConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
    )
    torch.manual_seed(0)
    model = BigBirdModel(config).eval()
    long = torch.randint(1, 60, (1, 96))
    with torch.no_grad():
        with unchanged(model):
            fresh = model(input_ids=long).last_hidden_state
        with unchanged(model) as changed:
            model(input_ids=long[:, :8])
        again = model(input_ids=long).last_hidden_state
        model(input_ids=long[:, :8])
        stuck = model(input_ids=long).last_hidden_state
    assert any("attention_type" in name for name in changed)
    assert torch.equal(fresh, again)
    assert not torch.allclose(fresh, stuck, atol=1e-3)


class Counter(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(size))
        self.seen: list[int] = []
        self.limits = {"longest": 0}
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table += 1
        self.seen.append(len(x))
        self.limits["longest"] = len(x)
        self.inner = nn.Linear(2, 2)
        self.late = x
        return x


def test_everything_is_put_back_and_named() -> None:
    module = Counter(4)
    inner = module.inner
    with unchanged(module) as changed:
        module(torch.zeros(3))
    assert set(changed) == {"table", "seen", "limits", "inner", "late"}
    assert module.inner is inner
    assert module.table.tolist() == [0.0] * 4
    assert (module.seen, module.limits) == ([], {"longest": 0})
    assert not hasattr(module, "late")
    with unchanged(module) as changed:
        pass
    assert changed == []


def test_written_weights_are_refused() -> None:
    module = Counter((1 << 20) + 1)
    with pytest.raises(ModelError, match="writes into table"), unchanged(module):
        module(torch.zeros(3))
