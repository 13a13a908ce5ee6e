"""Which graphs a checkpoint becomes: usually one, for some tasks several that work together."""

from compress.checkpoint import Checkpoint
from export.cached import with_cache


def parts(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return the checkpoint of each graph by the graph's name, as the ecosystem calls it."""
    if checkpoint.task == "text-generation":
        cached = with_cache(checkpoint)
        if cached is not None:
            return {"model": cached}
    return {"model": checkpoint}
