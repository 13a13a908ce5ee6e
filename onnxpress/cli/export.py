"""`export onnx | validate`."""

from pathlib import Path
from typing import Any

import click

from onnxpress.cli.options import (
    Group,
    Output,
    common,
    model_argument,
    out_option,
    provider_option,
)
from onnxpress.stages import ModelChoice, Run, export_model


@click.group(cls=Group)
def export_group() -> None:
    """Write ONNX graphs that are proven equal to their source.

    In a shell, type `onnxpress export onnx …`: a bare `export` is the shell's own builtin, which
    returns 0 and does nothing.
    """


@export_group.command("onnx")
@model_argument
@out_option
@click.option(
    "--target", type=click.Choice(["portable", "cpu", "cuda"]), default="cpu", show_default=True,
    help="What the graph is shaped for; portable runs on any ONNX runtime.",
)  # fmt: skip
@click.option("--opset", type=int, default=23, show_default=True, help="18 to 24.")
@provider_option
@common
def onnx_command(
    model: ModelChoice,
    out: Path,
    target: str,
    opset: int,
    provider: str,
    run: Run,
    output: Output,
) -> None:
    """Export MODEL; a graph that fails the parity gate is not published (exit code 3)."""
    from export.graph import ExportConfig

    result = export_model(model, ExportConfig(target, opset), provider, out, run)
    output.show(result, _export_text)


@export_group.command("validate")
@model_argument
@click.argument("bundle", type=click.Path(path_type=Path), metavar="OUT_DIR")
@provider_option
@common
def validate_command(
    model: ModelChoice, bundle: Path, provider: str, run: Run, output: Output
) -> None:
    """Hold the graph in OUT_DIR against MODEL; exit code 3 where they disagree."""
    from export.bundle import open_bundle
    from export.parity import check_parity

    opened = open_bundle(bundle)
    with run.progress("verify", None) as advance:
        report = check_parity(model.open(), opened.model_path, provider, advance)
    output.show({"bundle": str(bundle), **report.to_json()}, _validate_text)
    report.raise_if_failed()


def _export_text(result: dict[str, Any]) -> str:
    worst = result["parity"]["worst"]
    return (
        f"{result['path']}/model.onnx: {result['bytes'] / 1e6:.1f} MB, "
        f"{', '.join(result['inputs'])} → {', '.join(result['outputs'])}\n"
        f"parity: {result['parity']['checks']} checks passed; nearest to its bound: "
        f"{worst['output']} at {worst['case']} ({worst['rule']}), "
        f"error {worst['rms']:.2g} of {worst['rms_allowed']:.2g} allowed"
    )


def _validate_text(result: dict[str, Any]) -> str:
    failed = [check for check in result["checks"] if not check["passed"]]
    lines = [
        f"failed: {c['output']} at {c['case']} ({c['rule']}, {c['session']}): error {c['rms']:.2g} rms, "
        f"{c['largest']:.2g} at most; allowed {c['rms_allowed']:.2g} and {c['largest_allowed']:.2g}"
        for c in failed[:10]
    ]
    count = len(result["checks"])
    return "\n".join(
        [*lines, f"{result['bundle']}: {count - len(failed)} of {count} checks passed"]
    )
