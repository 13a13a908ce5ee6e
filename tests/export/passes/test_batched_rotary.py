import numpy as np
import pytest

from export.graph import ExportConfig, build_graph
from export.passes import PASSES
from export.passes.batched_rotary import batched_rotary_
from tests.export.graphs import checkpoint_of, graph_of, operators, run_graph


def test_every_target_has_it() -> None:
    assert all(batched_rotary_ in passes for passes in PASSES.values())


def test_caches_have_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of("llama")
    monkeypatch.setitem(PASSES, "portable", ())
    model = build_graph(checkpoint, ExportConfig(target="portable"))
    one, three = (checkpoint.signature.sample(batch, 9) for batch in (1, 3))
    before = run_graph(model, one)["logits"]
    with pytest.raises(Exception, match="cos_cache"):  # so the pass is needed
        run_graph(model, three)
    assert batched_rotary_(model) == operators(model)["RotaryEmbedding"] == 4
    assert np.array_equal(run_graph(model, one)["logits"], before)
    expected = checkpoint.predict(three)["logits"]
    np.testing.assert_allclose(run_graph(model, three)["logits"], expected, rtol=1e-3, atol=1e-5)


def test_models_without_rotation_are_left_alone() -> None:
    assert batched_rotary_(graph_of("bert")) == 0
