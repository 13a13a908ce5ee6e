"""The command line: `onnxpress`, and its groups as `compress` and `export`."""

import os
import sys
from pathlib import Path

import click

import onnxpress
from onnxpress.cli.benchmark import benchmark_group
from onnxpress.cli.compress import compress_group
from onnxpress.cli.export import export_group
from onnxpress.cli.options import Group
from onnxpress.cli.run import run_command


@click.group(cls=Group)
@click.version_option(onnxpress.__version__, prog_name="onnxpress")
def onnxpress_group() -> None:
    """Compress transformers into smaller, faster ONNX graphs, proven equal to their source.

    \b
    Exit codes: 0 done; 1 unexpected; 2 wrong setting; 3 the graph disagrees with its source;
    4 unusable model or data; 5 provider not obtained; 6 a quantized model drops further than it may,
    or a pruned one misses its speed; 8 destination exists or cannot be written; 9 the
    model cannot be exported; 10 training failed.
    """


onnxpress_group.add_command(compress_group, "compress")
onnxpress_group.add_command(export_group, "export")
onnxpress_group.add_command(benchmark_group, "benchmark")
onnxpress_group.add_command(run_command, "run")


def main() -> None:
    """Run `onnxpress`."""
    _start(onnxpress_group, "onnxpress")


def compress_main() -> None:
    """Run `compress`, also `python -m compress`."""
    _start(compress_group, "compress")


def export_main() -> None:
    """Run `export`, also `python -m export`."""
    _start(export_group, "export")


def _start(group: click.Group, name: str) -> None:
    # read when transformers and tokenizers are first imported, which no --help does
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.append(str(Path.cwd()))  # where package.module:factory is looked for, after all else
    group(prog_name=name)
