import json
from pathlib import Path

import click
import pytest

from benchmarks.distillation import figures, jobs, table
from onnxpress.cli.compress import compress_group


def test_every_job_is_a_command_that_starts_from_an_earlier_one() -> None:
    seen: set[str] = set()
    for job in jobs(Path("data")):
        group, name, *rest = job.arguments
        assert group == "compress"
        command = compress_group.commands[name]
        with click.Context(compress_group) as context:
            command.make_context(name, [*rest, "-o", "out"], parent=context)
        earlier = {x.removeprefix("OUT/") for x in rest if x.startswith("OUT/") and "json" not in x}
        assert earlier <= seen, job.name
        assert job.name not in seen
        seen.add(job.name)


def test_seeds_of_one_thing_are_one_row(tmp_path: Path) -> None:
    for name, metrics in {
        "a-0": {"accuracy": 90.0, "steps": 5},
        "a-1": {"accuracy": 92.0, "steps": 5},
        "b-hidden": {"evaluations": [[1, -8.5], [2, -8.0]], "steps": 2},
    }.items():
        (tmp_path / name).mkdir()
        manifest = {"lineage": [{"metrics": {}}, {"metrics": metrics}]}
        (tmp_path / name / "onnxpress.json").write_text(json.dumps(manifest))
    found = figures(tmp_path, ["a-0", "a-1", "b-hidden", "unfinished"])
    assert list(table(found))[2:] == [
        "| a | 91.00 ± 1.41 (2 seeds) | 5 |",
        "| b-hidden | 8.00 | 2 |",
    ]


@pytest.mark.parametrize("name", ["sst2/full", "sts/student", "gpt/teacher"])
def test_the_claims_have_a_job(name: str) -> None:
    assert name in {job.name for job in jobs(Path("data"))}
