import sys

import numpy as np
import pytest

from calib_data.embedded import LONGEST, SHORTEST, digits, pydoc_sentences
from calib_data.errors import DataError


def test_pydoc_is_clean_prose() -> None:
    sentences = pydoc_sentences()
    assert len(sentences) > 2000
    assert len(set(sentences)) == len(sentences)
    assert all(SHORTEST <= len(s) <= LONGEST for s in sentences)
    assert not [s for s in sentences if "\n" in s or ">>>" in s or "::=" in s or "**" in s]
    assert sum(s[0].isupper() for s in sentences) > 0.9 * len(sentences)


def test_pydoc_splits_are_disjoint_and_complete() -> None:
    train, test = pydoc_sentences("train"), pydoc_sentences("test")
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(pydoc_sentences())
    assert 0.07 < len(test) / (len(train) + len(test)) < 0.13
    assert pydoc_sentences("test") == test


def test_digits_splits() -> None:
    pytest.importorskip("sklearn")
    images, labels = digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)
    assert set(labels) == set(range(10))
    train, test = digits("train"), digits("test")
    assert (len(train[1]), len(test[1])) == (1437, 360)
    together = np.sort(np.concatenate([train[0], test[0]]).reshape(1797, -1), axis=0)
    assert (together == np.sort(images.reshape(1797, -1), axis=0)).all()


def test_digits_without_sklearn_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"onnxpress\[demo\]"):
        digits()
