"""Every family that is said to work: exported, and held to the gate, float and int8."""

from pathlib import Path

import pytest

from compress.quantize import QuantizeConfig, quantize
from export.graph import ExportConfig, build_graph
from export.parity import check_parity
from tests.compress.test_prune import apply_plan, random_plan
from tests.export.graphs import operators, save
from tests.tiny import FAMILIES, tiny_checkpoint

# family → why it cannot be exported; strict, so that a repaired one is noticed
KNOWN: dict[str, str] = {}
# families that share another one's code, or take long: with the slow tests
SLOW = ("bart", "camembert", "deit", "electra", "mistral", "phi", "qwen2", "t5", "xlm-roberta")
# attention that is not PyTorch's own: what depends on positions is added to the scores by hand
DECOMPOSED = ("deberta-v2", "mpnet")


def parameters() -> list:
    made = []
    for family in FAMILIES:
        marks = [pytest.mark.slow] if family in SLOW else []
        if family in KNOWN:
            marks.append(pytest.mark.xfail(strict=True, reason=KNOWN[family]))
        made.append(pytest.param(family, marks=marks))
    return made


@pytest.mark.parametrize("family", parameters())
def test_float(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family)
    model = build_graph(checkpoint, ExportConfig())
    layers = 0 if family in DECOMPOSED else 6 if family in ("bart", "t5") else 2
    assert operators(model)["Attention"] == layers
    report = check_parity(checkpoint, save(model, tmp_path))
    assert report.passed, report.worst()


@pytest.mark.slow
@pytest.mark.parametrize("family", parameters())
def test_pruned_and_int8(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family)
    pruned = apply_plan(checkpoint, random_plan(checkpoint))
    made = quantize(pruned, QuantizeConfig()).checkpoint
    model = build_graph(made, ExportConfig())
    assert operators(model)["MatMulInteger"] > 0
    report = check_parity(made, save(model, tmp_path))
    assert report.passed, report.worst()
