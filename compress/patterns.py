"""Patterns of module names, as users write them: a mistyped one is told, not ignored."""

import difflib
import fnmatch
from collections.abc import Sequence

from calib_data.errors import ConfigError


def check_pattern(option: str, pattern: str, names: Sequence[str]) -> None:
    """Raise `ConfigError` where `pattern` matches none of `names`; it tells those that come near."""
    if any(fnmatch.fnmatch(name, pattern) for name in names):
        return
    inside = [name for name in names if name.startswith(f"{pattern}.")]
    if inside:
        near = [f"{pattern}.*"]
    else:
        shapes = {_shape(name): name for name in reversed(names)}  # one of each kind of layer
        candidates = [*shapes.values(), *(n.rpartition(".")[2] for n in names)]
        close = difflib.get_close_matches(pattern, dict.fromkeys(candidates), n=3, cutoff=0.4)
        near = [name if name in names else f"*.{name}" for name in close]
    told = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:3])}, …"
    raise ConfigError(f"{option} {pattern} matches no layer that can be quantized; {told}")


def _shape(name: str) -> str:
    """Return a name without its layer's number."""
    return ".".join("0" if part.isdigit() else part for part in name.split("."))
