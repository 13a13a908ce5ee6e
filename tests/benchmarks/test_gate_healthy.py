import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate_healthy
from benchmarks.gate_healthy import (
    FORMS,
    PROCESSORS,
    SUBJECTS,
    THREADS,
    Outcome,
    markdown,
    outcomes,
)
from benchmarks.journal import Journal


def test_three_hundred_graphs() -> None:
    assert len(SUBJECTS) * len(FORMS) * len(PROCESSORS) * len(THREADS) >= 300


def test_refusals_are_counted_and_absent_graphs_are_not() -> None:
    found = [
        Outcome("bert", "float", "native", 1, 0, True, 0.5, "a"),
        Outcome("bert", "float", "avx2", 2, 3, False, 1.25, "logits at batch 3"),
        Outcome("gpt2", "fp16", "avx2", 2, 3, None, worst="no such kernel"),
    ]
    page = markdown(found)
    assert "**1 of 2 healthy graphs refused**; seeds 0, 3." in page
    assert "| bert | 2 | 1 | 0.875 | 1.21 | 1.25 |" in page
    assert "- gpt2, fp16 (1 times): no such kernel" in page
    assert "- bert, float, avx2, 2 threads, seed 3: 1.25 × what is allowed, logits at" in page


def test_one_process_with_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_healthy, "SUBJECTS", {"bert": SUBJECTS["bert"]})
    monkeypatch.setattr(gate_healthy, "FORMS", ("float",))
    started = []
    real = subprocess.Popen

    def popen(words: list[str], **settings: object) -> object:
        environment = settings["env"]
        assert isinstance(environment, dict)
        started.append((environment["ATEN_CPU_CAPABILITY"], environment["OMP_NUM_THREADS"]))
        others = [[f, k] for f in SUBJECTS for k in FORMS if (f, k) != ("bert", "float")]
        words[words.index("--skip") + 1] = json.dumps(others)  # the child knows all families
        assert words[0] == sys.executable
        return real(words, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", popen)
    for _ in range(2):  # the second time from the journal
        (found,) = outcomes(Journal(tmp_path, "a"), 1, "default, 2 threads")
        assert found.key == ("bert", "float", "default", 2, 0)
        assert found.passed
        assert 0 < found.strain <= 1
    assert started == [("default", "2")]
