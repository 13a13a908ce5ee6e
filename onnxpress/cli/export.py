"""`export onnx | validate | inspect | generate`."""

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
from onnxpress.processor import warn_where_inexact
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
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True,
    help="Precision of weights, float inputs and cache; half precision is for cuda and portable.",
)  # fmt: skip
@provider_option
@common
def onnx_command(
    model: ModelChoice,
    out: Path,
    target: str,
    opset: int,
    dtype: str,
    provider: str,
    run: Run,
    output: Output,
) -> None:
    """Export MODEL; a graph that fails the parity gate is not published (exit code 3)."""
    from export.graph import ExportConfig

    result = export_model(model, ExportConfig(target, opset, dtype), provider, out, run)
    output.show(result, _export_text)


@export_group.command("validate")
@model_argument
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@common
def validate_command(
    model: ModelChoice, bundle: Path, provider: str, run: Run, output: Output
) -> None:
    """Hold the graphs in BUNDLE against MODEL; exit code 3 where they disagree.

    BUNDLE is a directory that `export onnx` has written, or any .onnx file: that one is compared on
    the outputs that it shares with MODEL.
    """
    from export.bundle import open_bundle
    from export.foreign import check_foreign
    from export.publish import check_bundle

    opened = None if bundle.is_file() else open_bundle(bundle)
    warn_where_inexact(bundle)
    with run.progress("verify", None) as advance:
        if opened is None:
            report = check_foreign(model.open(), bundle, provider, advance)
        else:
            report = check_bundle(model.open(), opened, provider, advance)
    output.show({"bundle": str(bundle), **report.to_json()}, _validate_text)
    report.raise_if_failed()


@export_group.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Rows to run.")
@click.option(
    "--length",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens in a row; with a cache, also one token after as many.",
)
@provider_option
@common
def inspect_command(
    bundle: Path, batch: int, length: int, provider: str, run: Run, output: Output
) -> None:
    """Show what ONNX Runtime makes of BUNDLE, or of an .onnx file: kernels, providers, shares of time.

    Exit code 5 where a matrix product does not run on the provider asked for.
    """
    from export.placement import inspect_graphs, require_products

    warn_where_inexact(bundle)
    with run.progress("inspect", None):
        found = inspect_graphs(bundle, provider, (batch, length))
    graphs = {name: placement.to_json() for name, placement in found.items()}
    output.show({"bundle": str(bundle), "provider": provider, "graphs": graphs}, _inspect_text)
    require_products(found, provider)


@export_group.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="Text to go on from; repeat for a batch.",
)
@click.option("--max-new-tokens", type=int, help="Default: the model's own limit, or 128.")
@click.option("--beams", type=int, help="How many beams are searched; 1 for none.")
@click.option(
    "--temperature",
    type=float,
    help="0: always the likeliest token; above 0: sample.",
)
@click.option("--top-k", type=int, help="Sample among this many likeliest tokens; 0 for all.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens of this probability.")
@click.option("--threads", type=int, help="Default: ONNX Runtime's own choice.")
@provider_option
@common
def generate_command(
    bundle: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int | None,
    beams: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    threads: int | None,
    provider: str,
    run: Run,
    output: Output,
) -> None:
    """Continue text with the decoder in BUNDLE, as transformers' generate does.

    What no option says, the model's generation_config.json does: forced and suppressed tokens,
    penalties, beams, sampling, lengths.
    """
    from export.bundle import open_bundle
    from export.generate import GenerateConfig, generate_text

    config = GenerateConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        seed=run.seed,
    )
    warn_where_inexact(bundle)
    with run.progress("generate", max_new_tokens) as advance:
        texts, made, settings = generate_text(
            open_bundle(bundle), prompts, config, provider, threads, advance
        )
    output.show(
        {
            "texts": texts,
            "tokens": [list(row) for row in made.tokens],
            "settings": settings,
            "prompt_seconds": made.prompt_seconds,
            "tokens_per_second": made.tokens_per_second,
        },
        lambda result: "\n\n".join(map("".join, zip(prompts, result["texts"]))),
    )


def _export_text(result: dict[str, Any]) -> str:
    from export.witness import told_witness

    worst = result["parity"]["worst"]
    graphs = [
        f"{result['path']}/{name}.onnx: {graph['bytes'] / 1e6:.1f} MB, "
        f"{', '.join(_shortened(graph['inputs']))} → {', '.join(_shortened(graph['outputs']))}\n"
        for name, graph in result["graphs"].items()
    ]
    return "".join(graphs) + (
        f"int8 sums exact on: {result['exact_on']}\n"
        * bool(result["exact_on"])
        + f"parity: {result['parity']['checks']} checks passed; nearest to its bound: "
        f"{worst['output']} at {worst['case']} ({worst['rule']}), "
        f"error {worst['rms']:.2g} of {worst['rms_allowed']:.2g} allowed\n"
        f"{told_witness(result['witness'])}"
    )


def _shortened(names: list[str]) -> list[str]:
    """Return the names, a cache as one."""
    caches = ("past_key_values.", "present.")
    return list(dict.fromkeys(f"{n.split('.')[0]}.…" if n.startswith(caches) else n for n in names))


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


def _inspect_text(result: dict[str, Any]) -> str:
    return "\n\n".join(_graph_text(name, graph) for name, graph in result["graphs"].items())


def _graph_text(name: str, graph: dict[str, Any]) -> str:
    samples = list(graph["samples"])
    rows = [("operator", "nodes", "provider", *samples)]
    for use in graph["operators"]:
        shares = [f"{use['share'][sample]:.1%}" for sample in samples]
        rows.append((use["operator"], str(use["nodes"]), use["provider"] or "not run", *shares))
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    fused = ", ".join(f"{count} {operator}" for operator, count in graph["fused"].items())
    summary = f"{name}: {len(graph['nodes'])} nodes, {graph['copies']} copies between devices"
    return "\n".join([summary, f"fused: {fused or 'none'}", *table])
