import numpy as np
import pytest

from benchmarks.graph_quality import with_head
from benchmarks.worker import WorkerError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from tests.tiny import write_sentence_encoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_sentence_encoder(tmp_path_factory.mktemp("e") / "model")))


def test_a_graph_without_pooling_is_pooled(checkpoint: Checkpoint) -> None:
    batch = checkpoint.signature.sample(batch=3, sequence=9, ragged=True)
    outputs = checkpoint.predict(batch)

    def hidden(_: object) -> dict[str, np.ndarray]:
        return {"last_hidden_state": outputs["token_embeddings"]}

    found = with_head(checkpoint, hidden)(batch)["sentence_embedding"]
    assert found == pytest.approx(outputs["sentence_embedding"], abs=1e-6)
    whole = with_head(checkpoint, lambda batch: outputs)(batch)
    assert whole is outputs, "a graph that pools is left to do so"


def test_embeddings_that_are_no_numbers_are_no_quality(checkpoint: Checkpoint) -> None:
    lost = {"sentence_embedding": np.full((2, 32), np.nan, np.float32)}
    with pytest.raises(WorkerError, match="no finite number"):
        with_head(checkpoint, lambda batch: lost)({})
