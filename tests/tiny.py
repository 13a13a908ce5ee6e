"""Small seeded models and tokenizers, made on the spot: no test needs a download."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.bert.configuration_bert import BertConfig

WORDS = (
    "the a cat dog bird sat ran flew on under over mat tree house red blue green small large "
    "and or not is was one two three what when where python module function value returns "
    "text with from to of in it that this for as by are be an at"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer over `WORDS`, letters and word pieces."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = SPECIAL + WORDS + letters[1:] + [f"##{c}" for c in letters]
    vocabulary = list(dict.fromkeys(vocabulary))
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_bert_config(**changes: Any) -> BertConfig:
    """Return a two-layer BERT config, 4 heads of 8, 64 positions."""
    settings: dict[str, Any] = dict(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return BertConfig(**(settings | changes))


def write_bert(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny BERT encoder with its tokenizer; return the directory."""
    torch.manual_seed(seed)
    AutoModel.from_config(tiny_bert_config(**changes)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def write_classifier(directory: Path, seed: int = 0, labels: int = 3, **changes: Any) -> Path:
    """Write a tiny BERT sequence classifier with its tokenizer; return the directory."""
    torch.manual_seed(seed)
    config = tiny_bert_config(num_labels=labels, **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def write_sentence_encoder(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny encoder in the sentence-transformers layout: mean pooling, normalised."""
    write_bert(directory, seed, **changes)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.models.Normalize",
        },
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


SENTENCES = [
    "the cat sat on the mat",
    "a small red bird flew over the tree",
    "what is a python module",
    "the function returns a value",
    "two dogs ran under the large house and three cats sat on it",
    "it was not blue",
    "green",
    "the text is from one module to that one",
] * 4
