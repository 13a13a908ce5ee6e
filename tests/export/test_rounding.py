from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from calib_data.errors import ConfigError, ParityError
from export.cases import parity_cases
from export.precision import in_precision
from export.rounding import Rounded, exactly
from export.trial import make_trial
from tests.tiny import tiny_checkpoint

U = torch.finfo(torch.float32).eps / 2


def spread(compute: Callable[[], torch.Tensor], draws: int = 64) -> torch.Tensor:
    """Return the root mean square over draws of what rounding moves."""
    with exactly():
        y = compute()
    moved = []
    for seed in range(draws):
        with Rounded(seed):
            moved.append(compute().double() - y)
    return torch.stack(moved).square().mean(dim=0).sqrt()


def sequential(terms: np.ndarray) -> np.ndarray:
    """Return the sums of rows, added one after another in float32: the least careful kernel."""
    total = np.zeros(len(terms), np.float32)
    for column in terms.T.astype(np.float32):
        total += column
    return total


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["of both signs", "of one sign"])
def test_a_sum_moves_as_adding_one_after_another_moves_it(shift: float) -> None:
    terms = np.random.default_rng(0).standard_normal((400, 1024)) + shift
    terms = terms.astype(np.float32).astype(np.float64)
    found = float(np.sqrt(np.mean((sequential(terms) - terms.sum(axis=1)) ** 2)))
    given = torch.tensor(terms, dtype=torch.float32)
    size = float(spread(lambda: given.sum(dim=1)).square().mean().sqrt())
    assert 0.7 * found < size < 3 * found


def test_a_product_moves_by_its_rows_and_columns() -> None:
    a, b = torch.randn(8, 256), torch.randn(256, 8)
    size = spread(lambda: a @ b)
    expected = 0.41 * U * a.norm(dim=1)[:, None] * b.norm(dim=0)
    assert float((size / expected).median()) == pytest.approx(1, rel=0.6)


def test_what_no_weight_went_into_is_left_alone() -> None:
    moved = spread(lambda: torch.log(torch.arange(1, 9).float()) * 4)
    assert float(moved.max()) <= 8 * U * 4  # PyTorch's own rounding, no more
    with Rounded(0):
        once = torch.log(torch.arange(1, 9).float())
    with Rounded(1):
        assert torch.equal(once, torch.log(torch.arange(1, 9).float()))


def test_exactly_is_float64_whatever_is_cast_inside() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with exactly(), torch.no_grad():
        found = torch.softmax(layer(x).to(torch.float32), dim=-1).float()
    y = torch.softmax(layer.double()(x.double()), dim=-1)
    assert found.dtype == torch.float64
    assert torch.equal(found, y)


def test_exactly_keeps_what_a_forward_writes_into_a_buffer() -> None:
    """Scaled rotary embeddings choose their frequencies so."""
    buffer = torch.zeros(2)
    with exactly():
        buffer.copy_(torch.tensor([1.0, 2.0]))
        buffer.mul_(3)
    assert buffer.tolist() == [3.0, 6.0]


def test_weights_beyond_half_precision_are_refused_by_name() -> None:
    checkpoint = tiny_checkpoint("bert")
    with torch.no_grad():
        checkpoint.module.encoder.layer[1].output.dense.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense\.weight.*65,504.*overflow"):
        in_precision(checkpoint, "fp16")


def test_model_that_overflows_in_half_precision_is_refused_with_the_module() -> None:
    checkpoint = tiny_checkpoint("bert")
    with torch.no_grad():
        layer = checkpoint.module.encoder.layer[1]
        layer.intermediate.dense.weight.mul_(100)
        layer.output.dense.weight.mul_(1e5)
    part = in_precision(checkpoint, "fp16")
    with pytest.raises(ParityError, match=r"overflows in float16.*65,504.*encoder\.layer\.1.*bf16"):
        make_trial(part, dict(parity_cases(part)), lambda: None)


def test_tokens_of_the_largest_embeddings_are_among_the_cases_in_half_precision() -> None:
    checkpoint = in_precision(tiny_checkpoint("bert"), "fp16")
    table = checkpoint.module.embeddings.word_embeddings.weight
    with torch.no_grad():
        table[7] = 1000
    cases = dict(parity_cases(checkpoint))
    assert cases["the largest embeddings"]["input_ids"][0, 0] == 7
    assert "the largest embeddings" not in dict(parity_cases(tiny_checkpoint("bert")))
