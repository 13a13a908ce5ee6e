"""The export stage: build the graph, pass the gate, publish; or keep the report and publish nothing."""

from collections.abc import Callable
from pathlib import Path

from compress.checkpoint import Checkpoint
from compress.files import destination_errors, staged_directory, write_json
from export.bundle import OnnxBundle, open_bundle, write_bundle
from export.graph import ExportConfig, build_graph
from export.parity import ParityReport, check_parity


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

    Raises `ParityError` where the graph disagrees with the checkpoint: nothing is published then,
    and the report is kept beside the destination as `NAME.parity.json`.
    """
    kept = destination.parent / f"{destination.name}.parity.json"
    with staged_directory(destination, overwrite) as staging:
        model = build_graph(checkpoint, config)
        progress()
        bundle = write_bundle(model, checkpoint, config.to_json(), staging)
        report = check_parity(checkpoint, bundle.model_path, provider, progress)
        write_json(staging / "parity.json", report.to_json())
        if not report.passed:
            with destination_errors(kept):
                write_json(kept, report.to_json())
        report.raise_if_failed()
    kept.unlink(missing_ok=True)
    return open_bundle(destination), report
