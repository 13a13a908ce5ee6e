import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calib_data.batches import Batches
from calib_data.errors import ConfigError, DataError, ModelError
from compress.checkpoint import Checkpoint, weights_sha256
from compress.distill import DistillConfig, distill, prepare, running_teacher
from compress.observe import Observer
from compress.pairing import Pairing
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.training import TrainConfig, units
from tests.compress.pairs import batch_for, make
from tests.compress.test_prune import apply_plan, random_plan
from tests.tiny import (
    SPECIAL,
    WORDS,
    student_from_layers,
    tiny_batches,
    tiny_checkpoint,
    tiny_tokenizer,
)

BRIEF = TrainConfig(steps=25, learning_rate=2e-3)
LARGE = {
    "initializer_range": 0.1
}  # fresh layers of the usual size hardly change what they are given


def distance(student: Checkpoint, teacher: Checkpoint) -> float:
    sample = next(iter(tiny_batches()))
    mine, theirs = (c.predict(sample)[c.output] for c in (student, teacher))
    mask = sample["attention_mask"].numpy()
    if mine.ndim == 3:
        mine, theirs = mine[mask == 1], theirs[mask == 1]
    return float(np.sqrt(np.mean((mine - theirs) ** 2)))


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("bert", "feature-extraction"),
        ("gpt2", "text-generation"),
    ],
)
def test_student_comes_nearer(family: str, task: str) -> None:
    teacher = tiny_checkpoint(family, task, num_hidden_layers=4, **LARGE)
    student = student_from_layers(teacher, [0, 3])
    hashes = [weights_sha256(c.module) for c in (teacher, student)]
    batches = tiny_batches()
    told: list[float] = []
    result = distill(teacher, student, batches, DistillConfig(alpha=1.0, train=BRIEF), told.append)
    assert distance(result.checkpoint, teacher) < 0.8 * distance(student, teacher)
    assert [weights_sha256(c.module) for c in (teacher, student)] == hashes
    assert result.report["losses"] == told
    assert result.report["parameters_student"] < result.report["parameters_teacher"]
    entry = result.checkpoint.lineage[-1]
    assert [entry[k] for k in ("stage", "teacher", "parent", "data")] == [
        "distill",
        *hashes,
        batches.fingerprint,
    ]
    assert DistillConfig.from_json({k: v for k, v in entry["settings"].items() if k != "weights"})


def test_pruned_student_heals() -> None:
    teacher = tiny_checkpoint("bert", "text-classification", **LARGE)
    student = apply_plan(teacher, random_plan(teacher))
    result = distill(teacher, student, tiny_batches(), DistillConfig(train=BRIEF))
    assert distance(result.checkpoint, teacher) < 0.8 * distance(student, teacher)
    assert result.checkpoint.structure == student.structure


def test_a_wider_teacher_is_met_and_the_projection_dropped() -> None:
    teacher = tiny_checkpoint("bert", hidden_size=48, **LARGE)
    student = tiny_checkpoint("bert", **LARGE)
    config = DistillConfig(("hidden", "relations"), train=BRIEF)
    result = distill(teacher, student, tiny_batches(), config)
    assert result.report["loss_last"] < result.report["loss_first"]
    assert {n: p.shape for n, p in result.checkpoint.module.named_parameters()} == {
        n: p.shape for n, p in student.module.named_parameters()
    }


def test_the_teacher_may_be_asked_elsewhere() -> None:
    teacher = tiny_checkpoint("bert", "text-classification", **LARGE)
    student = student_from_layers(teacher, [0])
    asked: list[Pairing] = []
    batches, answers = tiny_batches(), {}

    def lookup(checkpoint: Checkpoint, pairing: Pairing) -> Observer:
        asked.append(pairing)
        run = running_teacher(checkpoint, pairing)
        return lambda batch: answers.setdefault(str(batch["input_ids"].tolist()), run(batch))

    config = DistillConfig(("logits", "hidden"), train=replace(BRIEF, steps=5))
    plain = distill(teacher, student, batches, config)
    cached = distill(teacher, student, batches, config, ask_teacher=lookup)
    assert [pairing.teacher_needs for pairing in asked] == [frozenset({"outputs", "layers"})]
    assert cached.report["losses"] == plain.report["losses"]
    assert len(answers) == len(batches)


def test_seq2seq_student_comes_nearer() -> None:
    teacher = make("t5", "text2text-generation", num_layers=3, num_decoder_layers=4)
    student = make("t5", "text2text-generation", seed=1)
    batches = [batch_for(student)]
    made = prepare(teacher, student, batches, DistillConfig(("logits", "hidden")))
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=5e-3)
    totals = []
    for _ in range(20):
        loss = torch.stack(list(made.terms(batches[0], units(batches[0])).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.7 * totals[0]


BERT = ("bert", "text-classification")


def wider(family: str, task: str) -> Checkpoint:
    return make(family, task, hidden_size=16)


SENTENCE = ("bert", "sentence-embedding")
GPT2 = ("gpt2", "text-generation")
REFUSED = {
    "task": (BERT, tiny_checkpoint("bert"), {}, "teacher is for text-classification"),
    "labels": (BERT, tiny_checkpoint(*BERT, num_labels=3), {}, "needs the same logits"),
    "vocabulary": (GPT2, tiny_checkpoint(*GPT2, vocab_size=200), {}, "200 token ids, the teacher 107"),
    "depth": (BERT, tiny_checkpoint(*BERT, num_hidden_layers=3), {"losses": ("hidden",)}, "only 2"),
    "no embedding": (
        ("bert", "feature-extraction"), tiny_checkpoint("bert"), {"losses": ("embedding",)},
        "one vector",
    ),
    "no logits": (
        ("bert", "feature-extraction"), tiny_checkpoint("bert"), {"losses": ("logits",)},
        "needs the same logits of both: the student gives none",
    ),
    "embedding width": (
        SENTENCE, wider(*SENTENCE), {"losses": ("embedding",)}, "similarity takes any width",
    ),
    "neighbours' width": (
        SENTENCE, wider(*SENTENCE), {"losses": ("contrastive",)}, "similarity takes any width",
    ),
    "one number": (
        (*BERT, {"num_labels": 1}), tiny_checkpoint(*BERT, num_labels=1), {},
        "use --losses logits-mse",
    ),
    "quantized": (
        BERT, quantize(tiny_checkpoint(*BERT), QuantizeConfig()).checkpoint, {},
        "quantized student",
    ),
    "attention unseen": (
        ("mpnet", "feature-extraction"), tiny_checkpoint("mpnet"), {"losses": ("relations",)},
        "use hidden",
    ),
    "image size": (
        ("vit", "image-classification"), tiny_checkpoint("vit", "image-classification", image_size=8),
        {}, "images of (3, 8, 8), the teacher of (3, 12, 12)",
    ),
    "hard without labels": (BERT, tiny_checkpoint(*BERT), {"losses": ("hard",)}, "no labels for it"),
    "alpha without labels": (BERT, tiny_checkpoint(*BERT), {"alpha": 0.5}, "use --alpha 1"),
    "alpha without logits": (
        BERT, tiny_checkpoint(*BERT), {"alpha": 0.5, "losses": ("hidden",)}, "none is chosen",
    ),
    "no weight": (BERT, tiny_checkpoint(*BERT), {"losses": ("hidden=0",)}, "has the weight 0"),
    "map outside": (
        BERT, tiny_checkpoint(*BERT), {"losses": ("hidden",), "layer_map": "0:1,1:4"},
        "layer 4 of the teacher, which has 0 to 1",
    ),
    "map outside, student": (
        BERT, tiny_checkpoint(*BERT), {"losses": ("hidden",), "layer_map": "2:1"},
        "layer 2 of the student",
    ),
    "relation map outside": (
        BERT, tiny_checkpoint(*BERT), {"losses": ("relations",), "relation_map": "0:2"},
        "layer 2 of the teacher",
    ),
    "maps of embeddings": (
        BERT, tiny_checkpoint(*BERT), {"losses": ("attention",), "layer_map": "-1:-1"},
        "pairs embeddings only",
    ),
    "relation heads": (
        BERT, tiny_checkpoint(*BERT), {"losses": ("relations",), "relation_heads": 5},
        "does not divide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_pairs_that_cannot_be_compared_are_refused(case: Any) -> None:
    (family, task, *changes), student, settings, message = case
    teacher = make(family, task, **(changes[0] if changes else {}))
    batches = [{k: v for k, v in batch_for(teacher).items() if k != "labels"}]
    with pytest.raises((ModelError, ConfigError, DataError), match=re.escape(message)) as caught:
        prepare(teacher, student, batches, DistillConfig(**settings))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code in (2, 4)


def test_layers_of_an_encoder_meet_no_decoder() -> None:
    pair = [make("bart", "text2text-generation", seed=seed) for seed in (0, 1)]
    batches = [batch_for(pair[0])]
    for text in ("0:0,2:3", "1:1"):
        prepare(*pair, batches, DistillConfig(("hidden",), layer_map=text))
    with pytest.raises(ConfigError, match="different stacks"):
        prepare(*pair, batches, DistillConfig(("hidden",), layer_map="1:2"))


def test_no_rows_are_refused() -> None:
    pair = [tiny_checkpoint(*BERT) for _ in range(2)]
    with pytest.raises(DataError, match="at least one row"):
        prepare(*pair, [], DistillConfig())


def other_tokenizer() -> Any:
    """Whole words only, in another order, and none of them lower-cased."""
    words = [*SPECIAL, *reversed(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    )


def test_embeddings_are_distilled_across_tokenizers() -> None:
    theirs = other_tokenizer()
    teacher = replace(make("gpt2", SENTENCE[1], vocab_size=len(theirs)), processor=theirs)
    student = make(*SENTENCE, **LARGE)
    batches = Batches(
        tiny_batches().examples, student.processor, batch_size=4, teacher_processor=theirs
    )
    names = ("embedding", "similarity", "contrastive")
    result = distill(teacher, student, batches, DistillConfig(names, train=BRIEF))
    assert result.report["loss_last"] < 0.7 * result.report["loss_first"]
    batch = next(iter(batches))
    own = teacher.predict({k[8:]: v for k, v in batch.items() if k.startswith("teacher_")})
    apart = [
        (1 - (c.predict(batch)["sentence_embedding"] * own["sentence_embedding"]).sum(1)).mean()
        for c in (student, result.checkpoint)
    ]
    assert apart[1] < apart[0]
    for name in ("hidden", "attention", "relations"):
        with pytest.raises(ModelError, match="tokenizers of their own"):
            prepare(teacher, student, batches, DistillConfig((name,)))
    with pytest.raises(ModelError, match="one tokenizer, or each needs its own"):
        prepare(teacher, student, tiny_batches(), DistillConfig(names))


def test_classes_are_distilled_across_tokenizers() -> None:
    theirs = other_tokenizer()
    teacher = make("gpt2", BERT[1], vocab_size=len(theirs))
    examples = tiny_batches(label=[0, 1] * 8).examples
    batches = Batches(examples, tiny_tokenizer(), batch_size=4, teacher_processor=theirs)
    prepare(teacher, make(*BERT), batches, DistillConfig(("logits",)))
    decoders = [make(*GPT2, vocab_size=n) for n in (len(theirs), len(tiny_tokenizer()))]
    with pytest.raises(ModelError, match="tokenizers of their own"):
        prepare(*decoders, batches, DistillConfig(("logits",)))
