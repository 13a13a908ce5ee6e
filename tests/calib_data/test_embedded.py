import sys
from pathlib import Path

import numpy as np
import pytest

from calib_data.embedded import LONGEST, SHORTEST, digits, docstrings, pydoc_sentences
from calib_data.errors import DataError


def test_pydoc_is_clean_prose() -> None:
    sentences = pydoc_sentences()
    assert len(sentences) > 2000
    assert len(set(sentences)) == len(sentences)
    assert all(SHORTEST <= len(s) <= LONGEST for s in sentences)
    assert not [s for s in sentences if "\n" in s or ">>>" in s or "::=" in s or "**" in s]
    assert sum(s[0].isupper() for s in sentences) > 0.9 * len(sentences)


def test_docstrings_are_parsed_not_run(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text(
        'raise SystemExit  # if imported\nclass A:\n    """Hold one thing. It is kept for good.\n\n'
        '    >>> A()\n    """\n    async def f(self):\n        """Return what was put in before."""\n'
    )
    (tmp_path / "template.py").write_text("class {name}:\n")
    (tmp_path / "tests" / "b.py").write_text('"""These are the tests of all that."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert docstrings() == ["It is kept for good.", "Return what was put in before."]
    assert sorted(docstrings("train") + docstrings("test")) == sorted(docstrings())
    (tmp_path / "a.py").unlink()
    with pytest.raises(DataError, match="without its library's sources; use pydoc"):
        docstrings()


def test_docstrings_to_train_on_are_none_that_pydoc_tests_on() -> None:
    train = docstrings("train")
    assert len(set(train)) == len(train) > 5000
    assert not {*train} & {*pydoc_sentences("test")}


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
