import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from calib_data.errors import ConfigError, DataError
from calib_data.readers import data_files, require_files
from calib_data.sources import Examples, open_data

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def rows(examples: Examples) -> dict[str, list]:
    return {role: examples.column(role) for role in examples.roles}


def test_every_text_format_gives_the_same_examples(write, tmp_path: Path) -> None:
    expected = {"text": ["one cat", "a dog, two"], "label": [1, 0]}
    table = datasets.Dataset.from_dict({"Sentence": expected["text"], "label": expected["label"]})
    table.to_parquet(tmp_path / "x.parquet")
    records = [{"sentence": "one cat", "label": 1}, {"label": 0, "sentence": "a dog, two"}]
    lines = "\n".join(map(json.dumps, records))
    specs = [
        write("x.csv", 'sentence,label\r\none cat,1\r\n"a dog, two",0.0\r\n'),
        write("x.tsv", "sentence\tlabel\none cat\t1\na dog, two\t0"),
        write("x.jsonl", lines),
        write("x.json", lines + "\n\n"),
        str(tmp_path / "x.parquet"),
    ]
    for spec in specs:
        assert rows(open_data(spec)) == expected, spec
        assert open_data(spec).dataset.cache_files == []


def test_csv_follows_rfc_4180(write) -> None:
    spec = write("x.csv", 'text,score\n"two\nlines, ""quoted""",1\n"\u2028sep",2\n123,3\n')
    assert open_data(spec).column("text") == ['two\nlines, "quoted"', "\u2028sep", "123"]
    with pytest.raises(DataError, match="cannot be read"):
        open_data(write("bad.csv", 'text,label\n"never closed,1\n'))


def test_tsv_keeps_stray_quotes_and_unwraps_wrapped_fields(write) -> None:
    spec = write("x.tsv", '"he said\t0\n"a ""b"" c"\t1\n"a" and "b"\t0\n"\t1\n')
    examples = open_data(spec, "text,label")
    assert examples.column("text") == ['"he said', 'a "b" c', '"a" and "b"', '"']


def test_lines_of_any_language_and_latin1(write) -> None:
    assert open_data(write("x.de", "ein Haus\r\n\n  \nzwei")).column("text") == ["ein Haus", "zwei"]
    assert open_data(write("x.txt", "caf\xe9".encode("latin-1"))).column("text") == ["café"]
    assert open_data(write("y.txt", "\ufeffcafé")).column("text") == ["café"]


def test_columns_by_position_skip_and_by_name(write) -> None:
    spec = write("x.csv", "7,a b,c d,2.5\n8,e f,g h,0\n")
    examples = open_data(spec, "_,sentence1,sentence2,score")
    assert rows(examples) == {
        "text": ["a b", "e f"],
        "text_pair": ["c d", "g h"],
        "score": [2.5, 0],
    }
    spec = write("y.csv", "Body,kind,text\nx,spam,no\ny,ham,no\nz,spam,no\n")
    examples = open_data(spec, "query=body,label=kind")
    assert rows(examples) == {"text": ["x", "y", "z"], "label": [1, 0, 1]}
    assert examples.label_names == ("ham", "spam")
    assert examples.relabel(["spam", "eggs", "ham"]).column("label") == [0, 2, 0]
    with pytest.raises(DataError, match="lacks: ham"):
        examples.relabel(["spam", "eggs"])


def test_class_names_come_with_the_features(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    content = {"text": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / "x.parquet")
    examples = open_data(str(tmp_path / "x.parquet"))
    assert examples.label_names == ("no", "yes")
    assert examples.column("label") == [1, 0]


def test_blank_texts_are_dropped_and_classes_ignore_the_limit(write) -> None:
    lines = [{"text": t, "label": k} for t, k in [("a", "x"), (" ", "z"), (None, "w"), ("b", "y")]]
    spec = write("x.jsonl", "\n".join(map(json.dumps, lines)))
    assert open_data(spec).column("text") == ["a", "b"]
    assert open_data(spec, limit=1).label_names == ("x", "y")


def test_limit_is_seeded_and_keeps_order(write) -> None:
    spec = write("x.txt", "\n".join(f"line {i:03}" for i in range(100)))
    ten = open_data(spec, limit=10).column("text")
    assert ten == sorted(ten)
    assert (
        ten == open_data(spec, limit=10).column("text") == open_data(spec).limit(10).column("text")
    )
    assert ten != open_data(spec, limit=10, seed=1).column("text")
    assert len(open_data(spec, limit=1000)) == 100


def test_images_keep_their_values(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    examples = open_data("digits:test", limit=7)
    image = examples.column("image")[0]
    assert (image.shape, image.dtype, image.max()) == ((8, 8), np.float32, 1.0)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"img": [[0, 255], [3, 4]], "label": 0}))
    (image,) = open_data(str(path)).column("image")
    assert image.dtype == np.uint8
    assert image.tolist() == [[0, 255], [3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("x.csv", "a man,a boy,5.0\nb,c,1\n", None, "a man, a boy, 5.0.*--columns sentence1,"),
        ("x.csv", "text,label\na,1\n", "text=body", "no column body; it has text, label"),
        ("x.csv", "text,label\na\n", None, "row 1 has 1 fields, the header has 2"),
        ("x.csv", "a,b,c\n", "text,label", "row 1 has 3 fields, --columns names 2"),
        ("x.csv", "question,sentence\na,b\n", None, "several columns for text"),
        ("x.csv", "text,score\na,1\nb,high\n", None, "row 2: score 'high'"),
        ("x.csv", "text,score\n,x\nb,nan\n", None, "row 2: score 'nan'"),
        ("x.csv", "text,label\na,1\nb,0.5\n", None, "row 2: label '0.5' is not a class"),
        ("x.csv", "text,label\na,1\nb,\n", None, "row 2 has no label"),
        ("x.csv", "", None, "is empty"),
        ("x.csv", "text\n\n", None, "holds no examples"),
        ("x.txt", " \n", None, "holds no examples"),
        ("x.npy", "", None, "I open files ending in .jsonl"),
        ("x.jsonl", '{"text": "a"}\n{oh}', None, "line 2 is not JSON"),
        ("x.jsonl", "[1]", None, "not a JSON object"),
        ("x.jsonl", '{"text": 3}', None, "row 1: text is 3, not a string"),
        ("x.jsonl", '{"image": [1, 2]}', None, "image 1 is not an H×W"),
        ("x.parquet", "nonsense", None, "cannot be read as .parquet"),
    ],
)
def test_bad_data_names_cause_and_cure(write, name, content, columns, message) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_data(write(name, content), columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns", ["text,label=x", "text,what", "text,,label", "what=x", "text,sentence", ""]
)
def test_bad_columns_are_refused(write, columns: str) -> None:
    with pytest.raises(ConfigError, match="--columns"):
        open_data(write("x.csv", "text,label\na,1\n"), columns)


def test_bad_specs_are_refused(write) -> None:
    for spec in ("nowhere.csv", "pydoc:dev", "digits:", "hf:glue", "hf"):
        with pytest.raises(DataError):
            open_data(spec)
    with pytest.raises(ConfigError, match="CSV or TSV"):
        open_data(write("x.jsonl", '{"text": "a"}'), "text,label")
    with pytest.raises(ConfigError, match="limit"):
        open_data(write("x.txt", "a"), limit=0)


def test_hub_spec_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        if (path, config) != ("glue", "sst2"):
            raise FileNotFoundError(f"no {path}\nsecond line")
        return datasets.Dataset.from_dict({"sentence": ["a"], "label": [1], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows(open_data("hf:glue/sst2:train[:10%]")) == {"text": ["a"], "label": [1]}
    assert asked == [("glue/sst2", None, "train[:10%]"), ("glue", "sst2", "train[:10%]")]
    with pytest.raises(DataError, match="no org/glue; check the name and the connection"):
        open_data("hf:org/glue/sst2:train")
    assert asked[2:] == [("org/glue", "sst2", "train")]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared evaluation data is not here")
@pytest.mark.parametrize(
    ("name", "columns", "count", "roles"),
    [
        ("stsb/dev.csv", "sentence1,sentence2,score", 1500, {"text", "text_pair", "score"}),
        ("sst2/dev.tsv", None, 872, {"text", "label"}),
        ("agnews/train_subset_10k.tsv", "text,label", 10001, {"text", "label"}),
        ("multi30k/val.de", None, 1014, {"text"}),
    ],
)
def test_real_files_have_their_documented_rows(name, columns, count, roles) -> None:
    examples = open_data(str(SHARED / name), columns)
    assert len(examples) == count
    assert examples.roles == roles


def test_images_and_labels_of_an_npz_file(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    np.savez(path, x_train=images, y_train=np.array([2, 0, 1]), x_test=images[:1], y_test=[1])
    for spec, count in ((f"{path}", 3), (f"{path}:train", 3), (f"{path}:test", 1)):
        found = open_data(spec)
        assert len(found) == count
        assert (found.column("image")[0] == images[0]).all()
    assert open_data(str(path)).column("label") == [2, 0, 1]
    assert data_files(f"{path}:test") == [path]


@pytest.mark.parametrize(
    ("arrays", "spec", "told"),
    [
        ({"x_train": np.zeros((2, 4, 4))}, "images.npz:dev", "images.npz:train"),
        ({"weights": np.zeros(3)}, "images.npz", "its arrays are weights"),
        ({"x": np.zeros((2, 4, 4)), "y": np.zeros(3)}, "images.npz", "2 images and 3 labels"),
        ({"x": np.array([{}, {}], dtype=object)}, "images.npz", "cannot be read"),
    ],
    ids=["split", "names", "lengths", "pickled"],
)
def test_npz_files_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict, spec: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(DataError, match=told):
        open_data(spec)


def test_two_aligned_files_are_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.de").write_text("eins\n\ndrei\n")
    Path("train.en").write_text("one\ntwo\nthree\n")
    found = open_data("train.de+train.en")
    assert found.column("text") == ["eins", "drei"]  # a blank line takes its partner with it
    assert found.column("text_pair") == ["one", "three"]
    assert data_files("train.de+train.en") == [Path("train.de"), Path("train.en")]
    Path("short.en").write_text("one\n")
    with pytest.raises(DataError, match="3 and 1 lines"):
        open_data("train.de+short.en")
    Path("table.csv").write_text("text\none\n")
    with pytest.raises(DataError, match=r"table\.csv is no file of lines"):
        open_data("train.de+table.csv")


def test_a_whole_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("First line\n\n  second\n" * 10)
    whole = open_data(f"whole:{path}").column("text")
    parts = [open_data(f"whole:{path}:{split}").column("text")[0] for split in ("train", "test")]
    assert whole == ["".join(parts)]
    assert whole[0] == path.read_text()
    assert len(parts[0]) == int(0.9 * len(whole[0]))
    assert data_files(f"whole:{path}:train") == [path]
    with pytest.raises(DataError, match="not a file"):
        open_data(f"whole:{path}.gone")


def test_what_is_built_in_reads_no_files() -> None:
    assert data_files("pydoc:train") == data_files("hf:a/b:train") == []


def test_files_are_asked_for_before_anything_is_read(write) -> None:
    lines, images = write("a.txt", "one\n"), write("b.npz", b"")
    require_files(f"{lines},pydoc,2*hf:a/b:train,whole:{lines}:test,{images}:train,{lines}+{lines}")
    for spec in (
        f"{lines}.txt",
        f"whole:{lines}.txt",
        f"3*{lines}.txt",
        f"{lines}+gone.de",
        "c.npz",
    ):
        with pytest.raises(DataError, match="is not a file; check the path"):
            require_files(f"pydoc,{spec}")
    for spec in ("pydocs:train", write("shouted.NPZ", b"")):
        for opens in (require_files, open_data):
            with pytest.raises(DataError, match="is no data set I can open"):
                opens(spec)


def test_sources_joined_by_commas_give_the_texts_of_all(write) -> None:
    lines = write("a.txt", "one\ntwo\none\n")
    pairs = write("b.csv", "two,three,0.5\nfour,five,1\n")
    spec = f"{lines},{pairs}"
    found = open_data(spec, ";sentence1,sentence2,score")
    assert found.roles == {"text"}
    assert found.column("text") == ["one", "two", "four", "three", "five"]
    assert data_files(spec) == [Path(lines), Path(pairs)]
    assert len(open_data(spec, ";sentence1,sentence2,score", limit=2)) == 2
    mixed = open_data(f"{lines},pydoc:train")
    assert set(mixed.column("text")) > {"one", "two"}


def test_a_source_that_is_taken_several_times(write) -> None:
    small, large = write("a.txt", "one\ntwo\n"), write("b.txt", "two\nthree\n")
    found = open_data(f"3*{small},{large}").column("text")
    assert found == ["one", "two", "three", "one", "two", "one", "two"]
    # alone, and the larger number counts for what two sources have
    assert open_data(f"2*{large}").column("text") == ["two", "three"] * 2
    assert open_data(f"{small},2*{large}").column("text").count("two") == 2
    assert data_files(f"3*{small},{large}") == [Path(small), Path(large)]
    assert data_files(f"3*{small}") == [Path(small)]
    pairs = write("c.csv", "four,five,1\n")
    assert len(open_data(f"2*{pairs},{small}", "sentence1,sentence2,score;")) == 6


def test_a_source_that_is_varied_when_it_comes_again(write) -> None:
    lines = [f"the {i} quick brown foxes jump over the lazy dog" for i in range(20)]
    path, other = write("a.txt", "\n".join(lines)), write("b.txt", "one\ntwo\n")
    found = open_data(f"3~{path},2*{other}").column("text")
    assert found[:22] == [*lines, "one", "two"]
    assert found[22:24] == ["one", "two"]
    assert len(found) == 64
    again = found[24:]
    assert len({*again, *lines}) > 40
    assert open_data(f"3~{path},2*{other}").column("text") == found
    assert open_data(f"1~{path}").column("text") == lines
    assert data_files(f"3~{path}") == [Path(path)]


def test_a_source_that_is_taken_no_time_is_refused(write) -> None:
    path = write("a.txt", "one\n")
    with pytest.raises(ConfigError, match="0 times; leave it out"):
        open_data(f"0*{path}")
    with pytest.raises(DataError, match="digits has no text"):
        open_data("2*digits")


def test_a_star_in_a_file_name_counts_nothing(write, tmp_path, monkeypatch) -> None:
    write("2*a.txt", "one\n")
    monkeypatch.chdir(tmp_path)
    assert open_data("2*a.txt").column("text") == ["one"]


def test_a_comma_in_a_file_name_joins_nothing(write) -> None:
    path = write("a,b.txt", "one\n")
    assert open_data(path).column("text") == ["one"]


def test_sources_that_cannot_be_joined_are_named(write) -> None:
    lines = write("a.txt", "one\n")
    with pytest.raises(ConfigError, match="has 2 parts for 3 sources"):
        open_data(f"{lines},{lines},pydoc", "text;text")
    with pytest.raises(DataError, match="digits has no text"):
        open_data(f"{lines},digits")
