"""The export stage: build the graphs, pass the gate, publish; or keep the report and publish nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import Checkpoint
from compress.files import destination_errors, staged_directory, write_json
from export.bundle import OnnxBundle, open_bundle, write_bundle
from export.graph import ExportConfig, build_graph
from export.parity import ParityReport, check_graphs
from export.parts import parts
from export.precision import in_precision
from export.verdict import joined
from export.witness import hear_witness


def export_onnx(
    checkpoint: Checkpoint,
    destination: Path,
    config: ExportConfig,
    *,
    provider: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> tuple[OnnxBundle, ParityReport]:
    """Write `checkpoint` as a bundle at `destination` and return it with the gate's report.

    Raises `ParityError` where a graph disagrees with the checkpoint: nothing is published then,
    and the report is kept beside the destination as `NAME.parity.json`.
    """
    if config.dtype == "bf16" and provider == "cpu":
        raise ConfigError(
            "a bf16 graph cannot be checked on the CPU provider, which has no such operators; "
            "pass --provider cuda, or use --dtype fp16"
        )
    source = in_precision(checkpoint, config.dtype)
    kept = destination.parent / f"{destination.name}.parity.json"

    def built() -> Iterator[tuple[str, Checkpoint, ir.Model]]:
        for name, part in parts(source).items():
            yield name, part, build_graph(part, config)
            progress()

    with staged_directory(destination, overwrite) as staging:
        bundle = write_bundle(built(), checkpoint, config.to_json(), staging)
        witness = hear_witness(checkpoint, bundle, config.dtype)
        report = ParityReport(witness.checks)
        if all(check.passed for check in witness.checks):
            report = joined([report, check_bundle(checkpoint, bundle, provider, progress)])
        report = replace(report, witness=witness.entry)
        write_json(staging / "parity.json", report.to_json())
        if not report.passed:
            with destination_errors(kept):
                write_json(kept, report.to_json())
        witness.raise_if_failed()
        report.raise_if_failed()
    kept.unlink(missing_ok=True)
    return open_bundle(destination), report


def check_bundle(
    checkpoint: Checkpoint,
    bundle: OnnxBundle,
    provider: str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Return the gate's report on all graphs of `bundle` against `checkpoint`.

    Raises `ModelError` where its files were changed, or are not what the checkpoint becomes.
    """
    bundle.verify()
    source = in_precision(checkpoint, str(bundle.manifest["settings"]["dtype"]))
    made = parts(source)
    if set(made) != set(bundle.graphs):
        raise ModelError(
            f"{bundle.path} holds {', '.join(bundle.graphs)}; the model becomes {', '.join(made)}"
        )
    graphs = {name: (made[name], graph.path) for name, graph in bundle.graphs.items()}
    return check_graphs(source, graphs, provider, progress)
