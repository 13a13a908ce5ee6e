"""`run RECIPE`."""

from pathlib import Path

import click

from calib_data.errors import ConfigError
from onnxpress.cli.benchmark import show_report
from onnxpress.cli.options import Output, common, out_option
from onnxpress.stages import Run


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE.yaml")
@out_option
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE",
    help="A value for one of the recipe's variables; may be given several times.",
)  # fmt: skip
@common
def run_command(
    recipe: Path, out: Path, assignments: tuple[str, ...], run: Run, output: Output
) -> None:
    """Run a recipe's steps; those whose inputs, settings and code are unchanged are not run again.

    --overwrite runs all of them anew.
    """
    from onnxpress.recipe import read_recipe
    from onnxpress.recipe_run import run_recipe

    made = read_recipe(recipe, _parse(assignments))
    steps = run_recipe(made, out, run, tell=lambda line: click.echo(line, err=True))
    reports = [step for step in steps if step.stage == "report"]
    if reports and not output.as_json:
        show_report(out / reports[-1].name, output)
    else:
        output.show(
            {"steps": [{"name": step.name, "path": str(out / step.name)} for step in steps]},
            lambda result: "\n".join(step["path"] for step in result["steps"]),
        )


def _parse(assignments: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"--set wants NAME=VALUE, got {text!r}")
        values[name] = value
    return values
