"""Telling that a graph's integers are not exact on the processor at hand."""

from pathlib import Path

import click


def warn_where_inexact(path: Path) -> None:
    """Write one line to stderr where sums of int8 in the bundle or .onnx file are cut off here."""
    from export.bundle import open_bundle, read_graph
    from export.exactness import ALL, exact_on, this_processor_is_exact

    on = exact_on(read_graph(path)) if path.is_file() else open_bundle(path).exact_on
    if on not in (None, ALL) and not this_processor_is_exact():
        click.echo(
            f"{path}: its int8 sums are exact on {on} only, and this processor cuts them off; "
            "quantize again with --weight-range exact",
            err=True,
        )
