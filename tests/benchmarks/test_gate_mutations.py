from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.gate_mutations import Outcome, Subject, judge, markdown, prove, summary
from benchmarks.mutations import KINDS
from tests.export.graphs import cached_graph_of, checkpoint_of, graph_of, static_graph_of


def subject(int8: bool = False) -> Subject:
    checkpoint = checkpoint_of("bert", int8)
    return Subject(checkpoint, checkpoint, ir.to_proto(graph_of("bert", int8)).SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_some_graph(kind: str) -> None:
    graphs = [lambda: graph_of("bert"), lambda: graph_of("bert", int8=True),
              lambda: cached_graph_of("gpt2"), lambda: cached_graph_of("llama"),
              static_graph_of]  # fmt: skip
    changed = 0
    for make in graphs:
        model = make()
        told = KINDS[kind](model, np.random.default_rng(0))
        before, after = (ir.to_proto(m).SerializeToString() for m in (make(), model))
        assert (told is not None) == (before != after)
        changed += told is not None
    assert changed


def test_mutation_is_judged_once(tmp_path: Path) -> None:
    seen: set[tuple[str, str, str]] = set()
    kind = "attention scale"
    found = judge(subject(), "encoder", kind, np.random.default_rng(0), tmp_path, seen)
    assert found is not None
    assert (found.verdict, found.named) == ("caught", True)
    assert judge(subject(), "encoder", kind, np.random.default_rng(0), tmp_path, seen) is None


def test_proof_of_equivalence(tmp_path: Path) -> None:
    for int8 in (False, True):
        path = tmp_path / "mutated.onnx"
        model = graph_of("bert", int8)
        path.write_bytes(ir.to_proto(model).SerializeToString())
        assert prove(subject(int8), path, tmp_path) == (
            True,
            "every bit is the same, over 60 other batches",
        )
        node = next(n for n in model.graph if n.op_type == "Attention")
        node.attributes["scale"] = ir.AttrFloat32("scale", 8**-0.5 * 1.01)
        path.write_bytes(ir.to_proto(model).SerializeToString())
        equivalent, told = prove(subject(int8), path, tmp_path)
        assert not equivalent
        assert "moves by" in told


def test_summary_counts_and_hides_nothing() -> None:
    outcomes = [
        Outcome("encoder", "epsilon", "a", "m", "caught", ("float",), True),
        Outcome("encoder", "epsilon", "b", "m", "caught", ("same bits",)),
        Outcome("encoder", "bias dropped", "c", "m", "missed", proof="moves"),
        Outcome("encoder", "bias dropped", "d", "m", "equivalent", proof="same"),
        Outcome("encoder", "inputs swapped", "e", "m", "refused", proof="shape"),
    ]
    report = summary(outcomes, seed=3)
    assert report["share"] == pytest.approx(2 / 3)
    assert report["share by outputs alone"] == pytest.approx(1 / 3)
    assert report["module named"] == {"right": 1, "of": 1}
    page = markdown(report)
    assert "--count 4 --seed 3" in page
    assert "2 caught, 1 missed: **66.7%** (33.3% by the outputs alone" in page
    assert "encoder, bias dropped: c; moves" in page
    assert "encoder, bias dropped: d; same" in page
