"""A tokenizer whose tokens are the characters of a text, for models that start from nothing."""

from collections.abc import Iterable
from typing import Any

from calib_data.errors import DataError

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
MOST = 20_000  # characters: as many as scripts in use have; a file with more is no text


def character_tokenizer(texts: Iterable[str], max_length: int | None = None) -> Any:
    """Return a fast tokenizer with a token for each character in `texts`, and `SPECIAL` before them.

    Encoding and decoding a text of these characters gives it back as it was, spaces and line breaks
    too; other characters become the unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set().union(*texts))
    if not characters or len(characters) > MOST:
        raise DataError(
            f"the texts hold {len(characters)} different characters; a tokenizer of characters "
            f"needs 1 to {MOST}"
        )
    ids = {token: index for index, token in enumerate([*SPECIAL.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    lengths = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
        **lengths,
    )
