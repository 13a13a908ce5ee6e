"""Data sets that need no download: Python's help texts and docstrings, and scikit-learn's digits."""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from calib_data.errors import DataError

SPLITS = ("train", "test")
# folders of the library: what was installed, tests, and packages that not every Python has
_LEFT_OUT = {"site-packages", "test", "tests", "lib2to3", "idlelib"}
SHORTEST, LONGEST = 20, 400  # characters of a sentence worth encoding

_BULLET = re.compile(r"^\s*(?:[*+-]|\d+\.|\[\d+\])\s+")
# A full stop ends a sentence if a capital, quote or bracket follows; "e.g." and "i.e." do not.
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<=[.!?])\s+(?=[A-Z\"“(*])")
_MARKUP = re.compile(r"\*\*|``|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|(?<=[a-z]-) (?=[a-z])")


def pydoc_sentences(split: str | None = None) -> list[str]:
    """Return the English sentences of the help texts that come with Python, in order.

    `split` is None for all, "train" (about nine tenths) or "test". A sentence's own hash decides
    where it goes, so the two never share one, whichever Python's help texts they come from.
    """
    from pydoc_data.topics import topics  # 465 kB: read when asked for

    return _sentences((topics[name] for name in sorted(topics)), split)


def docstrings(split: str | None = None) -> list[str]:
    """Return the English sentences of the standard library's docstrings, in order.

    Its modules are parsed, not imported. `split` is as for `pydoc_sentences`, and by the same rule,
    so neither's training sentences are among the other's for testing. Raises DataError for a Python
    that comes without its library's sources.
    """
    found = _sentences(_docstrings(Path(sysconfig.get_path("stdlib"))), split)
    if not found:
        raise DataError("this Python comes without its library's sources; use pydoc for docstrings")
    return found


def _docstrings(library: Path) -> Iterator[str]:
    """Yield every docstring in the modules below a folder, without tests and what was installed."""
    for path in sorted(library.rglob("*.py")):
        if _LEFT_OUT & {*path.parts}:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template, not a module
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def _sentences(texts: Iterable[str], split: str | None) -> list[str]:
    found: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    for text in texts:
        for paragraph in _paragraphs(text):
            for sentence in _SENTENCE_END.split(paragraph):
                if _is_prose(sentence):
                    found[sentence] = None
    return [s for s in found if split is None or _split_of(s) == split]


def _paragraphs(text: str) -> list[str]:
    """Return the paragraphs and list items of one text, each on one line and without markup."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or _BULLET.match(line):
            paragraphs.append([])
        if line.strip():
            paragraphs[-1].append(_BULLET.sub("", line).strip())
    joined = (" ".join(lines) for lines in paragraphs if lines)
    return [_MARKUP.sub("", text) for text in joined]


def _is_prose(sentence: str) -> bool:
    """Return whether this is a sentence, not code, grammar, a title or a table."""
    if not SHORTEST <= len(sentence) <= LONGEST:
        return False
    if re.search(r"::=|>>>|\.\.\. |\*\*\*|===|---|~~~|\+=|\s[#|]\s", sentence):
        return False
    words = re.findall(r"(?<![\w.])[A-Za-z’'-]+(?=[\s,.;:!?)\"”]|$)", sentence)
    # Code is short of plain words; a title is short, and has no full stop.
    plain = sum(len(word) for word in words) >= 0.45 * len(sentence)
    ended = sentence.rstrip(')"”')[-1:] in (".", "!", "?", ":", ";")
    return plain and len(words) >= (3 if ended else 8)


def _split_of(sentence: str) -> str:
    return "test" if hashlib.sha256(sentence.encode()).digest()[0] % 10 == 0 else "train"


def digits(split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return 8×8 images of handwritten digits, (N, 8, 8) float32 in 0..1, and labels (N,) int64.

    `split` is None for all 1,797, "train" (four fifths, a fixed random choice) or "test".
    Raises DataError without scikit-learn, which carries the images.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        cure = 'pip install "onnxpress[demo]"'
        raise DataError(f"digits comes with scikit-learn, which is missing: {cure}") from None
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = int(0.8 * len(order))
    rows = np.sort({None: order, "train": order[:cut], "test": order[cut:]}[split])
    return images[rows], labels[rows]
