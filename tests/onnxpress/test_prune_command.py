"""`compress prune`: plans as files, healing in rounds, going on after a kill, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.yardstick import OVER
from calib_data.errors import ConfigError
from compress.blocks import find_groups
from compress.checkpoint import weights_sha256
from compress.criteria import CRITERIA
from compress.loading import open_checkpoint
from compress.plan import PrunePlan
from compress.prune_config import PruneConfig
from compress.quantize_config import SCHEME_SETTINGS, QuantizeConfig
from compress.sparsity import METHODS, zero_share
from onnxpress.cli import onnxpress_group
from onnxpress.cli.pruning import CRITERIA_NAMES, OVER_NAMES, SPARSITY_NAMES, TIMED_SCHEMES
from onnxpress.prune_choice import HealChoice, PruneChoice, config_of, rounds_of
from onnxpress.prune_shares import next_shares
from onnxpress.target import Target
from tests.benchmarks.yardsticks import CountingYardstick, milliseconds
from tests.tiny import SENTENCES, tiny_checkpoint, write, write_sentence_encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    write_sentence_encoder(folder / "encoder", num_hidden_layers=4)
    write(tiny_checkpoint("bert", "text-classification", num_labels=2), folder / "classifier")
    (folder / "text.txt").write_text("\n".join(SENTENCES))
    rows = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(SENTENCES))
    (folder / "labels.tsv").write_text(f"sentence\tlabel\n{rows}")
    return folder


@pytest.fixture
def prune(place: Path, tmp_path: Path) -> Callable[..., Result]:
    def invoke(*words: object, model: str = "encoder", data: str | None = "text.txt") -> Result:
        text = () if data is None else ("--data", place / data)
        line = (
            "compress", "prune", place / model, *text, "--max-length", 32, "--batch-size", 8,
            "--round-to", 8, *words, "--json",
        )  # fmt: skip
        return CliRunner().invoke(onnxpress_group, [str(word) for word in line])

    return invoke


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[CountingYardstick]:
    class Fake(CountingYardstick):
        pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.yardstick.Yardstick", Fake)
    return Fake


def done(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def units(checkpoint: Any) -> list[int]:
    return [group.units for group in find_groups(checkpoint.backbone)]


def test_a_plan_is_written_edited_and_applied(prune: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    told = done(prune("--heads", 0.25, "--layers", 0.25, "--plan-only", "-o", file))
    plan = json.loads(file.read_text())
    assert told["plan"] == plan
    assert set(plan) == {"keep", "layers"}
    assert prune("--plan-only", "-o", file).exit_code == 8
    plan["keep"]["encoder.layer.1.neurons"] = "0-7,24-31"
    plan["layers"]["encoder.layer"] = [1, 3]
    file.write_text(json.dumps(plan))
    direct = done(prune("--plan", file, "-o", tmp_path / "a"))
    assert direct["layers"]["encoder.layer.1.neurons"] == {"units": 64, "kept": 16}
    assert direct["layers"]["encoder.layer.0.neurons"]["kept"] == 0
    assert set(direct["reconstruction"]) == {"before", "after"}
    done(prune("--plan", file, "--no-reconstruct", "-o", tmp_path / "b", data=None))
    made = [open_checkpoint(tmp_path / name) for name in "ab"]
    assert units(made[0]) == units(made[1])
    assert weights_sha256(made[0].module) != weights_sha256(made[1].module)
    entry = made[0].lineage[-1]
    assert PrunePlan.from_json(entry["plan"]) == PrunePlan.from_json(plan)


def test_the_same_plan_comes_from_the_command_and_its_file(
    prune: Callable[..., Result], tmp_path: Path
) -> None:
    done(prune("--ffn", 0.5, "--plan-only", "-o", tmp_path / "plan.json"))
    done(prune("--plan", tmp_path / "plan.json", "-o", tmp_path / "filed"))
    done(prune("--ffn", 0.5, "-o", tmp_path / "direct"))
    filed, direct = (open_checkpoint(tmp_path / name) for name in ("filed", "direct"))
    assert weights_sha256(filed.module) == weights_sha256(direct.module)


def test_a_speed_is_asked_for_and_recorded(
    prune: Callable[..., Result], tmp_path: Path, place: Path, counted: type[CountingYardstick]
) -> None:
    told = done(
        prune("--speedup", 1.5, "--shape", "2x16", "--whole-layers", "-o", tmp_path / "out")
    )
    assert told["measured"]["held"]
    before, after = (
        milliseconds(open_checkpoint(path)) for path in (place / "encoder", tmp_path / "out")
    )
    assert before / after == pytest.approx(1.5, rel=0.03)
    entry = open_checkpoint(tmp_path / "out").lineage[-1]
    assert entry["target"]["speedup"] == 1.5
    assert entry["target"]["conditions"]["shapes"] == [[2, 16]]
    assert entry["measured"]["speedup"] == pytest.approx(before / after)
    assert entry["settings"]["criterion"] == "fisher"
    beyond = prune("--speedup", 50, "-o", tmp_path / "no")
    assert beyond.exit_code == 2
    assert "--speedup 50 cannot be reached: the graph is" in beyond.output
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.training").exists()


def test_a_pruned_model_goes_on_towards_its_original(
    prune: Callable[..., Result], tmp_path: Path, place: Path, counted: type[CountingYardstick]
) -> None:
    """Speed is over the original's, and each layer heals from the one that it was."""
    done(prune("--keep-layers", "0,2,3", "-o", tmp_path / "first"))
    line = ("--original", place / "encoder", "--speedup", 3, "--shape", "2x16", "--heal", 1)
    told = done(prune(*line, "-o", tmp_path / "second", model=tmp_path / "first"))
    before, after = (
        milliseconds(open_checkpoint(path)) for path in (place / "encoder", tmp_path / "second")
    )
    assert before / after == pytest.approx(3, rel=0.05)
    assert told["measured"]["speedup"] == pytest.approx(before / after)
    healing = open_checkpoint(tmp_path / "second").lineage[-1]
    assert healing["settings"]["layer_map"] == "0:0,1:2,2:3"
    assert healing["teacher"] == weights_sha256(open_checkpoint(place / "encoder").backbone)
    alone = prune("--original", place / "encoder", "--ffn", 0.5, "-o", tmp_path / "no")
    assert "--original is what healing learns from" in alone.output
    other = ("--original", tmp_path / "first", "--heal", 1, "--keep-layers", "0,1")
    refused = prune(*other, "-o", tmp_path / "no", model=place / "encoder")
    assert refused.exit_code == 4
    assert "name a model that this one was pruned from" in refused.output


def test_healing_from_remembered_answers_is_the_same(
    prune: Callable[..., Result], tmp_path: Path
) -> None:
    line = ("--ffn", 0.5, "--heal", 6, "--schedule", "iterative", "--rounds", 2)
    for name, more in (("asked", ()), ("looked-up", ("--cache-teacher",))):
        done(prune(*line, *more, "-o", tmp_path / name))
    asked, known = (open_checkpoint(tmp_path / name).lineage for name in ("asked", "looked-up"))
    for one, other in zip(asked, known, strict=True):
        if one["stage"] == "distill":
            losses = [[loss for _, loss in each["metrics"]["curve"]] for each in (one, other)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_missed_speed_is_an_exit_code_and_a_result(
    prune: Callable[..., Result], tmp_path: Path, counted: type[CountingYardstick]
) -> None:
    line = ("--speedup", 1.15, "--min-ffn", 64)
    done(prune(*line, "--plan-only", "-o", tmp_path / "plan.json"))  # keeps a table
    counted.real = staticmethod(lambda relative: min(1.0, relative + 0.4))
    missed = prune(*line, "-o", tmp_path / "out")
    assert missed.exit_code == 6, missed.output
    assert "nothing more can go" in missed.output
    assert open_checkpoint(tmp_path / "out").lineage[-1]["measured"]["held"] is False


def test_healing_in_rounds(prune: Callable[..., Result], tmp_path: Path) -> None:
    line = ("--heads", 0.5, "--ffn", 0.5, "--heal", 3, "--schedule", "iterative", "--rounds", 2)
    told = done(prune(*line, "-o", tmp_path / "out"))
    assert told["rounds"] == 2
    kept = {"heads": 0, "neurons": 0}
    for key, row in told["layers"].items():
        kept[key.rpartition(".")[2]] += row["kept"]
    assert kept == {"heads": 8, "neurons": 128}
    made = open_checkpoint(tmp_path / "out")
    stages = [entry["stage"] for entry in made.lineage[1:]]
    assert stages == ["prune", "distill", "prune", "distill"]
    log = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    assert len([line for line in log if '"loss"' in line]) == 6
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_weights(
    prune: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: type[CountingYardstick],
    stop: int,
) -> None:
    line = (
        "--speedup", 1.6, "--heal", 3, "--schedule", "iterative", "--rounds", 2, "--save-every", 1,
    )  # fmt: skip
    done(prune(*line, "-o", tmp_path / "whole"))
    out = tmp_path / "out"
    from onnxpress.rounds import RoundStates

    save, calls = RoundStates.save, []

    def killed(self: RoundStates, progressed: Any) -> None:
        save(self, progressed)
        calls.append(None)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(RoundStates, "save", killed)
    assert prune(*line, "-o", out).exit_code != 0
    monkeypatch.undo()
    monkeypatch.setattr("benchmarks.yardstick.Yardstick", counted)
    assert prune(*line, "-o", out).exit_code == 8  # neither continued nor replaced
    other = prune(*line, "--ranking", "uniform", "--resume", "-o", out)
    assert other.exit_code == 2
    assert "prune.ranking was global, is uniform" in other.output
    # times have changed since: what was chosen by them stays as it was
    counted.real = staticmethod(lambda relative: relative**2 if stop > 2 else relative)
    told = done(prune(*line, "--resume", "-o", out))
    assert told["rounds"] == 2
    first, second = (open_checkpoint(path) for path in (tmp_path / "whole", out))
    assert weights_sha256(first.module) == weights_sha256(second.module)
    assert [e["stage"] for e in first.lineage] == [e["stage"] for e in second.lineage]


def test_classifiers_are_healed_by_logits_and_hidden_states(
    prune: Callable[..., Result], tmp_path: Path
) -> None:
    line = ("--layers", 0.5, "--heal", 2, "-o", tmp_path / "out")
    done(prune(*line, model="classifier", data="labels.tsv"))
    entry = open_checkpoint(tmp_path / "out").lineage[-1]
    assert set(entry["settings"]["weights"]) == {"logits", "hidden", "hard"}
    (kept,) = PrunePlan.from_json(
        open_checkpoint(tmp_path / "out").lineage[-2]["plan"]
    ).layers.values()
    assert entry["settings"]["layer_map"] == f"0:{kept[0]}"
    assert entry["settings"]["train"]["learning_rate"] == 3e-4


def test_single_weights_stay_zero_through_healing(
    prune: Callable[..., Result], tmp_path: Path
) -> None:
    told = done(prune("--heads", 0.25, "--sparsity", 0.5, "--heal", 2, "-o", tmp_path / "out"))
    assert told["sparsity"]["zeros"] == pytest.approx(0.5, abs=0.01)
    made = open_checkpoint(tmp_path / "out")
    assert zero_share(made) == pytest.approx(0.5, abs=0.01)
    assert [e["stage"] for e in made.lineage[1:]] == ["prune", "sparsify", "distill"]
    line = ("--sparsity", "2:4", "--sparsity-method", "magnitude", "-o", tmp_path / "alone")
    done(prune(*line))
    assert [e["stage"] for e in open_checkpoint(tmp_path / "alone").lineage[1:]] == ["sparsify"]


def test_a_vocabulary_is_cut_last(
    prune: Callable[..., Result], tmp_path: Path, place: Path
) -> None:
    (tmp_path / "few.txt").write_text("the cat sat on the mat\n")
    (tmp_path / "keep.txt").write_text("tree\n\n")
    line = ("--vocab-from", tmp_path / "few.txt", "--keep-tokens", tmp_path / "keep.txt")
    told = done(prune(*line, "-o", tmp_path / "alone", data=None))
    assert told["vocabulary"]["tokens_after"] < told["vocabulary"]["tokens_before"]
    made = open_checkpoint(tmp_path / "alone")
    assert {"tree", "cat", "the"} <= set(made.processor.get_vocab())
    assert [e["stage"] for e in made.lineage[1:]] == ["vocabulary"]
    done(prune(*line, "--vocab-min-count", 2, "-o", tmp_path / "often", data=None))
    often = set(open_checkpoint(tmp_path / "often").processor.get_vocab())
    assert {"tree", "the"} <= often
    assert "cat" not in often
    done(prune(*line, "--ffn", 0.5, "--heal", 1, "-o", tmp_path / "both"))
    stages = [e["stage"] for e in open_checkpoint(tmp_path / "both").lineage[1:]]
    assert stages == ["prune", "distill", "vocabulary"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--speedup", 2, "--heads", 0.5), "--speedup decides how much goes; leave out --heads"),
        (("--speedup", 2, "--size", 1), "name one of --speedup, --latency and --size"),
        (("--whole-layers",), "--whole-layers goes with --speedup"),
        (("--plan", "x.json", "--ffn", 0.5), "--plan says what stays"),
        (("--plan", "x.json"), "x.json cannot be read as a plan"),
        (("--rounds", 2, "--heal", 3), "--rounds goes with --schedule iterative"),
        (("--schedule", "iterative"), "it goes with --heal"),
        (("--losses", "hidden"), "--losses is for healing; add --heal STEPS"),
        (("--cache-teacher",), "--cache-teacher is for healing; add --heal STEPS"),
        (("--heal", 0), "--heal must be at least 1"),
        (("--layers", 0.5, "--keep-layers", "0,1"), "say the same thing"),
        (("--keep-layers", "0,9"), "encoder.layer must be below 4"),
        (("--layers", 0.1), "less than one; raise --layers"),
        (("--criterion", "luck"), "'luck' is not one of"),
        (("--plan-only", "--heal", 3), "--plan-only prunes nothing"),
        (("--sparsity", "most"), "must be a share as 0.5, or 2:4"),
        (("--sparsity", 1.5), "--sparsity must be above 0"),
        (("--sparsity-method", "wanda"), "goes with --sparsity"),
        (("--keep-tokens", "x"), "--keep-tokens goes with --vocab-from"),
        (("--vocab-min-count", 2), "--vocab-min-count goes with --vocab-from"),
        (("--calibrate", 0), "--calibrate must be at least 1"),
        (("--shape", "8", "--speedup", 2), "--shape wants batch x length"),
    ],
)
def test_options_that_do_not_go_together(
    prune: Callable[..., Result], tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    result = prune(*words, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.glob("out*"))


def test_what_learns_from_data_needs_it(prune: Callable[..., Result], tmp_path: Path) -> None:
    result = prune("-o", tmp_path / "out", data=None)
    assert result.exit_code == 2
    assert "need --data" in result.output


def test_the_command_knows_every_criterion() -> None:
    assert CRITERIA_NAMES == CRITERIA
    assert SPARSITY_NAMES == METHODS
    assert OVER_NAMES == OVER
    assert [name for name in SCHEME_SETTINGS if not QuantizeConfig(name).needs_data] == list(
        TIMED_SCHEMES
    )


def test_shares_are_a_quarter_where_nothing_is_said() -> None:
    assert config_of({}, PruneChoice(), 3) == PruneConfig(heads=0.25, ffn=0.25, seed=3)
    assert config_of({"ffn": 0.5}, PruneChoice(), 0) == PruneConfig(heads=0, ffn=0.5)
    assert config_of({}, PruneChoice(Target(speedup=2.0)), 0) == PruneConfig(heads=0, ffn=0)
    assert (rounds_of("one-shot", None), rounds_of("iterative", None)) == (1, 3)


def test_rounds_need_healing() -> None:
    data: Any = object()
    with pytest.raises(ConfigError, match="--rounds must be at least 1"):
        PruneChoice(heal=HealChoice(1), rounds=0).check(PruneConfig(), data)


def test_shares_of_rounds_make_the_whole() -> None:
    source = tiny_checkpoint("bert", num_hidden_layers=4)
    config = PruneConfig(heads=0.75, ffn=0.75, layers=0.5, hidden=8, round_to=8)
    half = next_shares(config, source, source, 0.5)
    assert (half.heads, half.ffn, half.hidden) == (0.5, 0.5, 16)
    assert half.layers == pytest.approx(1 - 0.5**0.5)
    whole = next_shares(config, source, source, 1.0)
    assert (whole.heads, whole.ffn, whole.hidden, whole.layers) == (0.75, 0.75, 8, 0.5)
    # less than a step is left to a later round
    small = next_shares(PruneConfig(heads=0.0, ffn=0.05, round_to=16), source, source, 0.1)
    assert small.ffn == 0.0
