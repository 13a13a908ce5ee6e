from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from calib_data import metrics
from calib_data.batches import Batches, Predict
from calib_data.errors import DataError
from calib_data.metrics import Measured, default_metrics, drop, measure_metric
from calib_data.sources import Examples
from tests.tiny import SENTENCES, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def make(**columns: list) -> Examples:
    return Examples(datasets.Dataset.from_dict(columns), "test data")


def model(output: str, width: int, seed: int = 0, noise: float = 0.0) -> Predict:
    """Return a made-up model: mean token embeddings, or token embeddings if `output` is per token."""
    random = np.random.default_rng(seed)
    table = random.normal(size=(len(TOKENIZER), width))
    table += noise * np.random.default_rng(99).normal(size=table.shape)

    def predict(batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        assert not {"labels", "scores"} & batch.keys()
        vectors = table[batch["input_ids"].numpy()]  # (B, T, D)
        mask = batch["attention_mask"].numpy()[..., None]
        per_token = output in ("last_hidden_state", "token_logits")
        pooled = vectors if per_token else (vectors * mask).sum(1) / mask.sum(1)
        return {output.replace("token_", ""): pooled.astype(np.float32)}

    return predict


def alone(predict: Predict, output: str, texts: list[str]) -> list[np.ndarray]:
    """Return the outputs of texts that are run one by one, without padding."""
    return [predict(TOKENIZER([text], return_tensors="pt"))[output][0] for text in texts]


PAIRS = make(
    text=SENTENCES[:20],
    text_pair=SENTENCES[3:23],
    score=np.random.default_rng(1).random(20).round(2).tolist(),
)


def test_spearman_of_sides_matches_scipy() -> None:
    predict = model("sentence_embedding", 8)
    measured = measure_metric(
        "spearman", predict, PAIRS, TOKENIZER, task="sentence-embedding", batch_size=3
    )
    sides = [
        torch.tensor(np.stack(alone(predict, "sentence_embedding", PAIRS.column(side))))
        for side in ("text", "text_pair")
    ]
    cosines = cosine_similarity(*sides)
    assert measured.value == pytest.approx(
        100 * spearmanr(cosines, PAIRS.column("score")).statistic, abs=1e-6
    )
    np.testing.assert_allclose(measured.per_example, cosines, atol=1e-6)


def test_spearman_of_one_logit() -> None:
    predict = model("logits", 1)
    measured = measure_metric(
        "spearman", predict, PAIRS, TOKENIZER, task="text-classification", batch_size=3
    )
    encoded = TOKENIZER(PAIRS.column("text"), PAIRS.column("text_pair"), padding=True)
    logits = predict(encoded.convert_to_tensors("pt"))["logits"][:, 0]
    expected = spearmanr(logits, PAIRS.column("score")).statistic
    assert measured.value == pytest.approx(100 * expected)
    with pytest.raises(DataError, match="needs one logit, the model has 3"):
        metrics.spearman_of_logits(model("logits", 3), Batches(PAIRS, TOKENIZER))


def test_spearman_without_anything_to_rank() -> None:
    def constant(batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {"logits": np.ones((len(batch["input_ids"]), 1))}

    assert metrics.spearman_of_logits(constant, Batches(PAIRS, TOKENIZER)).value == 0
    flat = make(text=["a", "b"], score=[1.0, 1.0])
    with pytest.raises(DataError, match="two different scores"):
        metrics.spearman_of_logits(constant, Batches(flat, TOKENIZER))


def test_accuracy_counts_right_answers() -> None:
    predict = model("logits", 3)
    answers = [int(row.argmax()) for row in alone(predict, "logits", SENTENCES[:8])]
    labels = [*answers[:6], (answers[6] + 1) % 3, (answers[7] + 1) % 3]
    examples = make(text=SENTENCES[:8], label=labels)
    measured = measure_metric(
        "accuracy", predict, examples, TOKENIZER, task="text-classification", batch_size=3
    )
    assert measured.value == 75
    assert measured.per_example is not None
    assert measured.per_example.tolist() == [1] * 6 + [0] * 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_perplexity_matches_torch(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    predict = model("token_logits", len(tokenizer))
    examples = make(text=SENTENCES[:8])
    measured = measure_metric(
        "perplexity", predict, examples, tokenizer, task="text-generation", batch_size=3
    )
    losses = [
        cross_entropy(torch.tensor(logits[:-1]), torch.tensor(tokenizer(text)["input_ids"][1:]))
        for text, logits in zip(SENTENCES[:8], alone(predict, "logits", SENTENCES[:8]))
    ]
    counts = [len(tokenizer(text)["input_ids"]) - 1 for text in SENTENCES[:8]]
    assert measured.value == pytest.approx(np.exp(np.average(losses, weights=counts)), rel=1e-5)
    np.testing.assert_allclose(measured.per_example, losses, rtol=1e-5)
    assert not measured.higher_is_better


def test_perplexity_is_of_all_of_a_text() -> None:
    """A text longer than the model is shown at once is not judged by its beginning."""

    def certain_at_first(batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        ids = batch["input_ids"].numpy()
        logits = np.zeros((*ids.shape, len(TOKENIZER)), np.float32)
        begins = (ids[:, 0] == first)[:, None]  # the first window: it knows what comes
        right = np.eye(len(TOKENIZER), dtype=np.float32)[np.roll(ids, -1, axis=1)]
        return {"logits": logits + 50 * begins[..., None] * right}

    text = " ".join(SENTENCES[:6])
    ids = TOKENIZER(text)["input_ids"]
    first = ids[0]
    assert len(ids) > 21
    assert first not in ids[1:]
    found = measure_metric("perplexity", certain_at_first, make(text=[text]), TOKENIZER,
                           task="text-generation", max_length=8)  # fmt: skip
    unknown = len(ids) - 8  # each as likely as any
    expected = np.exp(unknown * np.log(len(TOKENIZER)) / (len(ids) - 1))
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_perplexity_survives_extreme_logits() -> None:
    def sure_and_wrong(batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        logits = np.zeros((*batch["input_ids"].shape, len(TOKENIZER)), np.float32)
        logits[..., 0] = 1e4
        return {"logits": logits}

    batches = Batches(make(text=SENTENCES[:3]), TOKENIZER)
    assert metrics.perplexity(sure_and_wrong, batches).value == np.inf
    with pytest.raises(DataError, match="no text of two tokens"):
        metrics.perplexity(sure_and_wrong, one_token())


def one_token() -> Batches:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    return Batches(make(text=["cat"]), tokenizer)


@pytest.mark.parametrize("output", ["sentence_embedding", "last_hidden_state"])
def test_cosine_fidelity_ignores_padding(output: str) -> None:
    ours, reference = model(output, 8, noise=0.3), model(output, 8)
    batches = Batches(make(text=SENTENCES[:12]), TOKENIZER, batch_size=5)
    measured = metrics.cosine_fidelity(ours, reference, batches, output)
    expected = [
        float(cosine_similarity(torch.tensor(a), torch.tensor(b), dim=-1).mean())
        for a, b in zip(*(alone(m, output, SENTENCES[:12]) for m in (ours, reference)))
    ]
    np.testing.assert_allclose(measured.per_example, expected, atol=1e-6)
    assert measured.value == pytest.approx(np.mean(expected))
    assert 0.8 < measured.value < 0.999
    assert metrics.cosine_fidelity(ours, ours, batches, output).value == pytest.approx(1)


def test_agreement_per_example_and_per_token() -> None:
    for output in ("logits", "token_logits"):
        ours, reference = model(output, 3, noise=0.5), model(output, 3)
        batches = Batches(make(text=SENTENCES[:12]), TOKENIZER, batch_size=5)
        measured = metrics.agreement(ours, reference, batches)
        same = [
            np.atleast_1d(a.argmax(-1) == b.argmax(-1))
            for a, b in zip(*(alone(m, "logits", SENTENCES[:12]) for m in (ours, reference)))
        ]
        assert measured.value == pytest.approx(100 * np.concatenate(same).mean())
        np.testing.assert_allclose(measured.per_example, [s.mean() for s in same])
        assert metrics.agreement(ours, ours, batches).value == 100


def test_rank_fidelity_whole_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).choice(["cat", "dog", "a", "the", "on", "red", "ran"], (40, 6))
    texts = [" ".join(row) for row in words]
    ours, reference = model("sentence_embedding", 8, noise=0.3), model("sentence_embedding", 8)
    batches = Batches(make(text=texts), TOKENIZER, batch_size=7)

    def expected(rows: slice) -> float:
        similar = []
        for predict in (ours, reference):
            vectors = torch.tensor(np.stack(alone(predict, "sentence_embedding", texts[rows])))
            matrix = cosine_similarity(vectors[:, None].double(), vectors[None].double(), dim=-1)
            similar.append(matrix[tuple(torch.triu_indices(*matrix.shape, 1))])
        return float(spearmanr(*similar).statistic)

    whole = metrics.rank_fidelity(ours, reference, batches, "sentence_embedding")
    assert whole.value == pytest.approx(expected(slice(None)), abs=1e-3)
    assert whole.per_example is None
    monkeypatch.setattr(metrics, "RANKED", 39)
    monkeypatch.setattr(metrics, "BLOCK", 20)
    blocks = metrics.rank_fidelity(ours, reference, batches, "sentence_embedding")
    halves = [expected(slice(0, 20)), expected(slice(20, 40))]
    np.testing.assert_allclose(blocks.per_example, halves, atol=1e-3)
    same = metrics.rank_fidelity(ours, ours, batches, "sentence_embedding")
    assert same.value == pytest.approx(1)
    assert blocks.value < 0.999


@pytest.mark.parametrize(
    ("task", "roles", "reference", "expected"),
    [
        ("sentence-embedding", {"text", "text_pair", "score"}, False, ("spearman",)),
        ("sentence-embedding", {"text"}, True, ("cosine_fidelity", "rank_fidelity")),
        ("sentence-embedding", {"text", "score"}, False, ()),
        ("feature-extraction", {"text"}, True, ("cosine_fidelity",)),
        ("text-classification", {"text", "label"}, False, ("accuracy",)),
        ("text-classification", {"text", "label", "score"}, False, ("accuracy",)),
        ("text-classification", {"text", "score"}, False, ("spearman",)),
        (
            "image-classification",
            {"image", "label"},
            True,
            ("accuracy", "cosine_fidelity", "agreement"),
        ),
        ("text-generation", {"text"}, False, ("perplexity",)),
        ("fill-mask", {"text"}, True, ("cosine_fidelity", "agreement")),
    ],
)
def test_default_metrics(task: str, roles: set, reference: bool, expected: tuple) -> None:
    assert default_metrics(task, roles, reference) == expected


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bleu", "text-generation", "no metric bleu; choose among spearman"),
        ("accuracy", "text-classification", "needs data with label"),
        ("perplexity", "fill-mask", "perplexity is not for fill-mask; choose among cosine_f"),
        ("spearman", "sentence-embedding", "needs data with score, text_pair"),
        ("rank_fidelity", "sentence-embedding", "needs a reference"),
        ("agreement", "feature-extraction", "not for feature-extraction"),
    ],
)
def test_a_metric_that_does_not_fit_says_why(name: str, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_metric(name, model("logits", 3), make(text=["a"]), TOKENIZER, task=task)


def test_fidelity_of_different_shapes_is_refused() -> None:
    batches = Batches(make(text=SENTENCES[:4]), TOKENIZER)
    two: Any = (model("logits", 3), model("logits", 4))
    with pytest.raises(DataError, match="compare models of one kind"):
        metrics.agreement(*two, batches)
    with pytest.raises(DataError, match="no output logits"):
        metrics.accuracy(
            model("sentence_embedding", 3), Batches(make(text=["a"], label=[0]), TOKENIZER)
        )


def test_a_drop_is_a_share_of_the_scale_or_of_a_perplexity() -> None:
    def fall(name: str, before: float, after: float, higher: bool = True) -> float:
        pair = (Measured(name, value, higher_is_better=higher) for value in (before, after))
        return drop(*pair)

    assert fall("spearman", 86.5, 86.0) == pytest.approx(0.005)
    assert fall("accuracy", 90.0, 91.0) == pytest.approx(-0.01)
    assert fall("cosine_fidelity", 1.0, 0.995) == pytest.approx(0.005)
    assert fall("perplexity", 4.0, 4.02, higher=False) == pytest.approx(0.005)
    assert fall("perplexity", 4.0, 3.0, higher=False) < 0
