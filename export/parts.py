"""Which graphs a checkpoint becomes: usually one, for some models several that work together."""

from compress.checkpoint import Checkpoint
from export.cached import with_cache
from export.cached_seq2seq import encoder_and_decoder
from export.precision import typed
from export.towers import whole_and_towers


def parts(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the checkpoint of each graph by the graph's name, as the ecosystem calls it.

    A model that generates, but whose cache is not keys and values, is exported without one.
    """
    found = whole_and_towers(checkpoint)
    if checkpoint.task == "text2text-generation":
        found = encoder_and_decoder(checkpoint)
    elif checkpoint.task == "text-generation":
        found = with_cache(checkpoint)
    return {name: typed(part) for name, part in (found or {"model": checkpoint}).items()}
