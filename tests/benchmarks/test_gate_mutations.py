from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.gate_mutations import (
    EVERY_KIND,
    Outcome,
    judge,
    markdown,
    mutations,
    prove,
    summary,
)
from benchmarks.gate_subjects import Head, Subject, build, twin
from benchmarks.journal import Journal
from export.parity import check_graphs
from export.sessions import open_session, run
from tests.export.graphs import cached_graph_of, checkpoint_of, graph_of, static_graph_of


def subject(int8: bool = False) -> Subject:
    checkpoint = checkpoint_of("bert", int8)
    return Subject(checkpoint, checkpoint, ir.to_proto(graph_of("bert", int8)).SerializeToString())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_each_kind_changes_some_graph(kind: str) -> None:
    graphs = [lambda: graph_of("bert"), lambda: graph_of("bert", int8=True),
              lambda: cached_graph_of("gpt2"), lambda: cached_graph_of("llama"),
              static_graph_of]  # fmt: skip
    changed = 0
    for make in graphs:
        model = make()
        told = EVERY_KIND[kind](model, np.random.default_rng(0))
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
    assert "| encoder | 2 | 1 | 1 | 1 | 1 |" in page
    assert "encoder, bias dropped: c; moves" in page
    assert "encoder, bias dropped: d; same" in page


def changed(kind: str, draws: int = 20) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the token states of a batch of 3 before and after a mutation that reaches them."""
    part = checkpoint_of("bert")
    case = part.signature.sample(3, 6, seed=1)
    before = run(open_session(ir.to_proto(graph_of("bert")).SerializeToString()), case)
    for seed in range(draws):
        model = graph_of("bert")
        EVERY_KIND[kind](model, np.random.default_rng(seed))
        after = run(open_session(ir.to_proto(model).SerializeToString()), case)
        if not np.array_equal(before["last_hidden_state"], after["last_hidden_state"]):
            return before, after
    raise AssertionError("nothing moved")


def test_nan_is_in_one_row() -> None:
    before, after = (found["last_hidden_state"] for found in changed("NaN in one row"))
    rows = np.isnan(after).any(axis=(1, 2))
    assert rows.sum() == 1
    assert np.isnan(after[rows]).all()
    np.testing.assert_array_equal(after[~rows], before[~rows])


def test_one_value_of_the_quietest_row_is_off() -> None:
    before, after = (found["last_hidden_state"] for found in changed("value in a quiet row × 1.01"))
    ((batch, token, column),) = np.argwhere(before != after)
    norms = np.linalg.norm(before, axis=-1)
    assert norms[batch, token] == norms.min()
    ratio = after[batch, token, column] / before[batch, token, column]
    assert ratio == pytest.approx(1.01, rel=1e-6)


def passes(subject: Subject, content: bytes, folder: Path) -> bool:
    (folder / "model.onnx").write_bytes(content)
    graphs = {"model": (subject.part, folder / "model.onnx")}
    return check_graphs(subject.checkpoint, graphs).passed


@pytest.mark.parametrize("family", ["sentence encoder, mean", "quiet tokens"])
def test_graphs_pass_before_they_are_damaged(family: str, tmp_path: Path) -> None:
    subject = build(family)
    assert passes(subject, subject.content, tmp_path)


def test_twins_differ_as_they_say(tmp_path: Path) -> None:
    subject = build("sentence encoder, cls")
    case = subject.part.signature.sample(3, 6, seed=1, ragged=True)
    for kind, told in (("pooling mode", " for cls"), ("module order", " → ")):
        made = next(m for i in range(9) if (m := twin(subject, kind, np.random.default_rng(i))))
        assert told in made[1]
        sessions = map(open_session, (subject.content, ir.to_proto(made[0]).SerializeToString()))
        before, after = (run(session, case) for session in sessions)
        np.testing.assert_array_equal(before["token_embeddings"], after["token_embeddings"])
        off = before["sentence_embedding"] - after["sentence_embedding"]
        assert np.abs(off).max() > 1e-3
    assert twin(subject, "one of two branches", np.random.default_rng(0)) is None


def test_one_branch_is_right_up_to_its_length(tmp_path: Path) -> None:
    subject = build("switch after 7 tokens")
    assert subject.checkpoint.module.head == Head(switch=7)
    sides = {}
    for seed in (0, 1):
        made = twin(subject, "one of two branches", np.random.default_rng(seed))
        assert made is not None
        sides[made[1].split()[0]] = made[0]
    assert set(sides) == {"short", "long"}
    for length, right, wrong in ((7, "short", "long"), (8, "long", "short")):
        case = subject.part.signature.sample(2, length)
        expected = subject.part.predict(case)["sentence_embedding"]
        for side, same in ((right, True), (wrong, False)):
            session = open_session(ir.to_proto(sides[side]).SerializeToString())
            found = run(session, case)["sentence_embedding"]
            assert np.allclose(found, expected, atol=1e-5) == same


def test_stopped_run_goes_on(tmp_path: Path) -> None:
    whole = list(mutations(2, seed=0, journal=Journal(tmp_path, "a")))
    before = (tmp_path / "journal.jsonl").read_text()
    assert list(mutations(2, seed=0, journal=Journal(tmp_path, "a"))) == whole
    assert (tmp_path / "journal.jsonl").read_text() == before  # nothing was tried again
