"""Small seeded models and tokenizers, made on the spot: no test needs a download."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.bert.configuration_bert import BertConfig

from calib_data.batches import Batches, ImageShape
from calib_data.sources import Examples
from compress.checkpoint import Checkpoint, save_checkpoint
from compress.signature import transformer_signature
from compress.sizes import StudentShape
from compress.students import make_student
from compress.tasks import get_task

_WORDS = (
    "the a cat dog bird sat ran flew on under over mat tree house red blue green small large "
    "and or not is was one two three what when where python module function value returns "
    "text with from to of in it that this for as by are be an at"
)
WORDS = _WORDS.split()
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
    settings: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
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
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
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


# family → what its tiny config needs beside `_SHARED`, in transformers' own names
_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
    "bert": {},
    "camembert": {"pad_token_id": 1, "max_position_embeddings": 66},
    "clip_text_model": {"projection_dim": 16},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "max_relative_positions": 64,
        "share_att_key": True,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.5},
    "llama": {"num_key_value_heads": 2},
    "marian": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "decoder_start_token_id": 0,
    },
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "mpnet": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2": {"num_key_value_heads": 2, "vocab_size": 120},  # its tokenizer class adds a token
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 66},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "xlm-roberta": {"pad_token_id": 1, "max_position_embeddings": 66},
}
_VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": {},
    "deit": {},
    "swin": {  # two stages of 8 × 8 and 4 × 4 patches, in windows of 4 × 4
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "window_size": 4,
    },
    "vit": {},
}
_IMAGE: dict[str, Any] = {"image_size": 12, "patch_size": 4, "num_channels": 3}
VISION = tuple(_VISION)
# exported, but not among those whose blocks the tests of pruning count
EXPORT_ONLY = ("marian", "swin")
FAMILIES = tuple(sorted({*_TEXT, *VISION} - {*EXPORT_ONLY}))


def tiny_config(family: str, **changes: Any) -> Any:
    """Return a two-layer config of `family`: 4 heads of 8, 64 neurons, 64 positions, no dropout."""
    if family in VISION:
        return AutoConfig.for_model(family, **(_SHARED | _IMAGE | _VISION[family] | changes))
    words = {
        "vocab_size": len(tiny_tokenizer()),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return AutoConfig.for_model(family, **(_SHARED | words | _TEXT[family] | changes))


def tiny_model(family: str, auto: Any = AutoModel, seed: int = 0, **changes: Any) -> Any:
    """Return a seeded model of `family` in eval mode, its weights three times the usual size.

    Fresh weights are so small that a mistake in one hardly shows; these behave like trained ones.
    """
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(3)
            else:  # biases and norms: away from their usual 0 and 1
                value.add_(torch.randn_like(value), alpha=0.1)
    return model.eval()


def tiny_checkpoint(family: str, task: str = "feature-extraction", **changes: Any) -> Checkpoint:
    """Return a seeded checkpoint of `family` for `task`, in memory."""
    model = tiny_model(family, getattr(transformers, get_task(task).auto_class), **changes)
    vision = family in VISION
    processor = ImageShape(model.config.image_size, 3) if vision else tiny_tokenizer()
    if not vision and not getattr(model.config, "type_vocab_size", 0):
        processor.model_input_names = ["input_ids", "attention_mask"]
    return Checkpoint(model, task, transformer_signature(model, model, processor), processor)


def tiny_batches(count: int = 16, batch_size: int = 4, **columns: list[Any]) -> Batches:
    """Return batches of the first `count` sentences, with labels or scores if `columns` has them."""
    table = datasets.Dataset.from_dict({"text": SENTENCES[:count], **columns})
    return Batches(Examples(table, "test data"), tiny_tokenizer(), batch_size=batch_size)


class SampledBatches:
    """Batches of what the model's signature calls valid inputs, for any family."""

    fingerprint = "sampled"

    def __init__(self, checkpoint: Checkpoint, count: int = 4, sequence: int = 16) -> None:
        self._made = [
            checkpoint.signature.sample(batch=4, sequence=sequence, seed=seed, ragged=True)
            for seed in range(count)
        ]

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self._made)


def write(checkpoint: Checkpoint, directory: Path) -> Path:
    """Save `checkpoint` in `directory`; return the directory."""
    directory.mkdir(parents=True)
    save_checkpoint(checkpoint, directory)
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


def student_from_layers(teacher: Checkpoint, keep: Sequence[int]) -> Checkpoint:
    """Return a model of the teacher's layers in `keep`, ascending."""
    return make_student(teacher, StudentShape(keep_layers=tuple(keep)))
