"""The commands as users type them: results, --json, wrong inputs, exit codes."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onnxpress.cli import onnxpress_group
from tests.tiny import SENTENCES, write_classifier, write_sentence_encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny sentence encoder, a classifier and some text."""
    place = tmp_path_factory.mktemp("cli")
    write_sentence_encoder(place / "encoder")
    write_classifier(place / "classifier")
    (place / "text.txt").write_text("\n".join(SENTENCES))
    (place / "labels.csv").write_text(
        "sentence,label\n" + "\n".join(f"{s},{i % 3}" for i, s in enumerate(SENTENCES))
    )
    return place


def invoke(*words: object) -> Result:
    return CliRunner().invoke(onnxpress_group, [str(word) for word in words])


def must(*words: object) -> dict:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    assert "Loading weights" not in result.stderr, "a library's own progress bar"
    return json.loads(result.stdout)


def test_the_whole_chain(place: Path, tmp_path: Path) -> None:
    text = ("--data", place / "text.txt", "--max-length", 32, "--batch-size", 8)
    pruned = must(
        "compress", "prune", place / "encoder", *text, "--heads", 0.25, "--ffn", 0.25,
        "--round-to", 8, "-o", tmp_path / "pruned",
    )  # fmt: skip
    assert pruned["parameters_after"] < pruned["parameters_before"]
    healed = must(
        "compress", "distill", "--teacher", place / "encoder", "--student", tmp_path / "pruned",
        *text, "--steps", 3, "-o", tmp_path / "healed",
    )  # fmt: skip
    assert healed["steps"] == 3
    must("compress", "quantize", tmp_path / "healed", "-o", tmp_path / "int8")
    told = must("compress", "inspect", tmp_path / "int8")
    assert [stage["stage"] for stage in told["lineage"]] == [
        "source",
        "prune",
        "distill",
        "quantize",
    ]
    exported = must("export", "onnx", tmp_path / "int8", "-o", tmp_path / "onnx")
    assert exported["parity"]["passed"]
    assert exported["graphs"]["model"]["outputs"] == ["token_embeddings", "sentence_embedding"]
    checked = must("export", "validate", tmp_path / "int8", tmp_path / "onnx")
    assert checked["passed"]
    # the float checkpoint is another model than the int8 graph
    wrong = invoke("export", "validate", tmp_path / "healed", tmp_path / "onnx")
    assert wrong.exit_code == 3


def test_weight_only(place: Path, tmp_path: Path) -> None:
    small = must(
        "compress", "quantize", place / "encoder", "--scheme", "weight-only", "--bits", 8,
        "--block-size", 16, "--skip", "encoder.layer.0.*", "-o", tmp_path / "small",
    )  # fmt: skip
    assert small["modules"] > 0
    told = must("compress", "inspect", tmp_path / "small")
    settings = {
        "scheme": "weight-only",
        "skip": ["encoder.layer.0.*"],
        "bits": 8,
        "block_size": 16,
    }
    assert told["lineage"][-1]["settings"].items() >= settings.items()
    exported = must("export", "onnx", tmp_path / "small", "-o", tmp_path / "onnx")
    assert exported["parity"]["passed"]


def test_inspect_draws_what_is_kept(place: Path, tmp_path: Path) -> None:
    must(
        "compress", "prune", place / "encoder", "--data", place / "text.txt", "--max-length", 32,
        "--heads", 0.25, "--ffn", 0.25, "--round-to", 8, "-o", tmp_path / "pruned",
    )  # fmt: skip
    picture = tmp_path / "kept.png"
    result = invoke("compress", "inspect", tmp_path / "pruned", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "hidden      32 of 32" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = invoke("compress", "inspect", tmp_path / "pruned", "--plot", picture)
    assert (again.exit_code, "exists; pass --overwrite" in again.stderr) == (8, True)
    wrong = invoke("compress", "inspect", tmp_path / "pruned", "--plot", tmp_path / "kept.doc")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    nowhere = picture / "kept.png"
    assert invoke("compress", "inspect", tmp_path / "pruned", "--plot", nowhere).exit_code == 8


def test_students_from_layers(place: Path, tmp_path: Path) -> None:
    result = must(
        "compress", "distill", "--teacher", place / "classifier", "--layers", 1,
        "--data", place / "labels.csv", "--max-length", 32, "--steps", 2, "-o", tmp_path / "student",
    )  # fmt: skip
    assert result["parameters_student"] < result["parameters_teacher"]
    told = must("compress", "inspect", tmp_path / "student")
    assert sum(name.endswith("heads") for name in told["layers"]) == 1


def test_narrower_students_and_a_cached_teacher(place: Path, tmp_path: Path) -> None:
    common = (
        "compress", "distill", "--teacher", place / "encoder", "--data", place / "text.txt",
        "--max-length", 32, "--steps", 3,
    )  # fmt: skip
    shape = ("--keep-layers", "1", "--hidden", 16, "--heads", 2, "--ffn", 32)
    told = [
        must(*common, *shape, "--losses", "similarity,hidden", *cache, "-o", tmp_path / name)
        for name, cache in (("plain", ()), ("cached", ("--cache-teacher",)))
    ]
    assert told[0]["loss_last"] == pytest.approx(told[1]["loss_last"], rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached", "plain"]
    config = json.loads((tmp_path / "cached" / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    assert [config[name] for name in names] == [1, 16, 2, 32]
    pooling = json.loads((tmp_path / "cached" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 16


STUDENT = ("compress", "distill", "--teacher", "{place}/encoder", "--data", "{place}/text.txt",
           "--max-length", "32", "-o", "{out}")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "--student or --layers"),
        (("--student", "{place}/encoder", "--ffn", "32"), 2, "--student or --layers"),
        (("--layers", "1", "--keep-layers", "0"), 2, "the same thing"),
        (("--keep-layers", "0,x"), 2, "as in 0,2,5, got 0,x"),
        (("--keep-layers", "0,2"), 2, "from 0 to 1"),
        (("--hidden", "20"), 2, "--hidden 16 or 24"),
        (("--hidden", "16", "--losses", "embedding"), 4, "similarity takes any width"),
        (("--layers", "1", "--cache-teacher", "--losses", "attention"), 2, "use relations"),
    ],
)
def test_students_that_cannot_be(
    words: tuple[str, ...], code: int, told: str, place: Path, tmp_path: Path
) -> None:
    filled = [word.format(place=place, out=tmp_path / "out") for word in (*STUDENT, *words)]
    result = invoke(*filled)
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_text_output_is_for_people(place: Path) -> None:
    result = invoke("compress", "inspect", place / "encoder")
    assert result.exit_code == 0
    assert "sentence-embedding" in result.stdout
    assert "encoder.layer.1.attention.self.heads      4 of 4" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("compress", "inspect", "{place}/nothing"), 4, "no such directory"),
        (("compress", "prune", "{place}/encoder", "--data", "{place}/text.txt", "--max-length", "32",
          "--heads", "1.5", "-o", "{out}"), 2, "--heads must be at least 0 and below 1"),
        (("compress", "prune", "{place}/encoder", "--data", "{place}/no.txt", "--max-length", "32",
          "-o", "{out}"), 4, "no.txt"),
        (("compress", "prune", "{place}/encoder", "--data", "{place}/text.txt", "--max-length", "500",
          "-o", "{out}"), 2, "positions"),
        (("compress", "quantize", "{place}/encoder", "-o", "{place}/encoder"), 8, "--overwrite"),
        (("compress", "quantize", "{place}/encoder", "-o", "{place}/text.txt/x"), 8, "cannot write"),
        (("compress", "quantize", "{place}/encoder", "--task", "poetry", "-o", "{out}"), 2, "poetry"),
        (("compress", "quantize", "{place}/encoder", "--bits", "4", "-o", "{out}"), 2, "no --bits"),
        (("compress", "quantize", "{place}/encoder", "--scheme", "weight-only", "--bits", "5", "-o",
          "{out}"), 2, "4, 8, got 5"),
        (("compress", "distill", "--teacher", "{place}/encoder", "--data", "pydoc", "-o", "{out}"),
         2, "--student or --layers"),
        (("compress", "distill", "--teacher", "{place}/encoder", "--layers", "9", "--data",
          "{place}/text.txt", "--max-length", "32", "-o", "{out}"), 2, "--layers"),
        (("export", "onnx", "{place}/encoder", "--opset", "7", "-o", "{out}"), 2, "--opset"),
        (("export", "onnx", "{place}/encoder", "--provider", "cuda", "-o", "{out}"), 5, "CUDA"),
        (("export", "validate", "{place}/encoder", "{place}/encoder"), 4, "no ONNX bundle"),
        (("benchmark", "report", "{place}/encoder", "--shapes", "8*8", "-o", "{out}"), 2, "--shapes"),
        (("benchmark", "report", "{place}/encoder", "-o", "{out}"), 4, "no ONNX bundle"),
        (("run", "{place}/no.yaml", "-o", "{out}"), 2, "no such recipe"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_a_code(
    place: Path, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    out = tmp_path / "out"
    result = invoke(*(word.format(place=place, out=out) for word in words))
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert told in lines[0]
    assert "Traceback" not in result.output
    assert not out.exists()
    assert not list(tmp_path.glob(".*")), "something half-written was left"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse what would make any file larger: a write fails halfway, for real."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("external", [False, True], ids=["graph", "external data"])
def test_a_write_that_fails_halfway_leaves_nothing(
    external: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if external:
        monkeypatch.setattr("export.bundle.EXTERNAL_DATA_BYTES", 10_000)
    command = ("export", "onnx", place / "classifier", "-o", tmp_path / "out")
    with largest_file(60_000):
        result = invoke(*command)
    assert result.exit_code == 8, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert f"cannot write {tmp_path / 'out'}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("external", [10**9, 10_000], ids=["graph", "external data"])
@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_full_disk_leaves_nothing(external: int, place: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=60k tmpfs {disk}"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], check=False).returncode:
        pytest.skip("this system lets a test mount no file system of its own")
    code = (
        f"import export.bundle; export.bundle.EXTERNAL_DATA_BYTES = {external}; "
        "from onnxpress.cli import main; main()"
    )
    words = ("export", "onnx", place / "classifier", "-o", disk / "out")
    command = shlex.join(map(str, (sys.executable, "-c", code, *words)))
    line = f"{mount}; {command}; code=$?; ls -A {disk}; exit $code"
    done = subprocess.run([*namespace, line], capture_output=True, text=True, check=False)
    assert done.returncode == 8, done.stderr
    assert f"no space left while writing {disk / 'out'}" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_labels_out_of_range_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("sentence,label\nthe cat sat,0\na dog ran,7\n")
    result = invoke(
        "compress", "prune", place / "classifier", "--data", tmp_path / "bad.csv",
        "--max-length", 32, "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 4
    assert "7" in result.stderr


def test_an_unexpected_error_is_one_line_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.loading

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("something\nnobody thought of")

    monkeypatch.setattr(compress.loading, "open_checkpoint", broken)
    result = invoke("compress", "inspect", place / "encoder")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "unexpected RuntimeError: something" in result.stderr


@pytest.mark.parametrize("name", ["onnxpress", "compress", "export"])
def test_help_imports_no_torch(name: str) -> None:
    code = (
        "import sys, onnxpress.cli as cli\n"
        f"cli.{name}_group(['--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "onnxpress export onnx encoder -o {out}",
        "python -m export onnx encoder -o {out}",
        "env export onnx encoder -o {out}",
    ],
)
def test_ways_to_type_export_in_a_real_shell(place: Path, tmp_path: Path, line: str) -> None:
    # bash's own `export onnx` returns 0 and does nothing, so look at the file, not at the code
    out = tmp_path / "out"
    run_in_bash(line.format(out=out), place)
    assert (out / "model.onnx").is_file()


def test_a_bare_export_is_swallowed_by_the_shell(place: Path, tmp_path: Path) -> None:
    # why the guide says what it says; if this fails, the guide can be simplified
    run_in_bash(f"export onnx encoder_x; true -o {tmp_path / 'out'}", place)
    assert not (tmp_path / "out").exists()


def run_in_bash(line: str, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True)


def test_training_leaves_its_log_and_no_workspace(place: Path, tmp_path: Path) -> None:
    trained = must(
        *("compress", "distill", "--teacher", place / "classifier", "--layers", 1),
        *("--data", place / "labels.csv", "--max-length", 32, "--steps", 4, "--accumulate", 2),
        *("--eval", place / "labels.csv", "--eval-every", 2, "--ema", 0.9, "--dropout"),
        *("--tensorboard", tmp_path / "board", "-o", tmp_path / "student"),
    )
    assert trained["metric"] == "accuracy"
    assert [step for step, _ in trained["evaluations"]] == [2, 4]
    assert "curve" not in trained
    lines = [json.loads(x) for x in (tmp_path / "student/training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "terms", "rate", "gradient_norm", "tokens_per_second"} <= set(lines[0])
    assert lines[1]["evaluation"] == trained["evaluations"][0][1]
    assert not (tmp_path / "student.training").exists()
    assert any((tmp_path / "board").iterdir())
    lineage = json.loads((tmp_path / "student/onnxpress.json").read_text())["lineage"]
    assert [step for step, _ in lineage[-1]["metrics"]["curve"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--steps", 3, "--epochs", 1], "either --steps or --epochs", 2),
        (["--patience", 2], "counts evaluations; add --eval", 2),
        (["--ema", 1], "--ema must be in [0, 1), got 1.0", 2),
        (["--epochs", 0], "--epochs must be above 0", 2),
        (["--weight-decay", -1], "--weight-decay must not be negative", 2),
    ],
)
def test_training_options_that_make_no_sense(
    words: list, message: str, code: int, place: Path, tmp_path: Path
) -> None:
    result = invoke(
        *("compress", "distill", "--teacher", place / "encoder", "--layers", 1),
        *("--data", place / "text.txt", *words, "-o", tmp_path / "out"),
    )
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out.training").exists()


@pytest.mark.slow
def test_two_processes_write_one_student(place: Path, tmp_path: Path) -> None:
    """The launch line of the guide: one result, one JSON document, near that of one process."""
    words = [
        *("compress", "distill", "--teacher", place / "classifier", "--layers", 1),
        *("--data", place / "labels.csv", "--max-length", 32, "--steps", 3, "--batch-size", 6),
        *("--save-every", 1, "--eval", place / "labels.csv", "--json"),
    ]
    results = []
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launcher in (("one", []), ("two", together)):
        done = subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                "onnxpress",
                *map(str, words),
                "-o",
                str(tmp_path / name),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0]["loss_last"] == pytest.approx(results[1]["loss_last"], rel=1e-3)
    assert results[0]["evaluations"] == results[1]["evaluations"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert len((tmp_path / "two" / "training.jsonl").read_text().splitlines()) == 3
