"""Does the gate refuse graphs that are right? Families, forms, processors and numbers of threads.

    python -m benchmarks.gate_healthy -o OUT [--seeds 1] [--only "avx2, 2 threads"]

Every graph is exported by the product and changed by nobody, so each one that the gate refuses is a
false alarm. Lesser processors are imitated: PyTorch's, oneDNN's and MKL's kernels are capped by their
environment variables, in a process of its own for each processor and number of threads. ONNX Runtime
has no such cap. OUT keeps what is done; a run that was stopped goes on there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gate_subjects import Sampled, float_checkpoint
from benchmarks.journal import Journal
from calib_data.errors import OnnxPressError
from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.checkpoint import Checkpoint
from compress.plan import PrunePlan
from compress.quantize import QuantizeConfig, quantize
from compress.versions import versions
from export.graph import ExportConfig, build_graph
from export.parity import check_graphs
from export.parts import parts
from export.precision import in_precision
from export.serialize import write_model

PROCESSORS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
THREADS = (1, 2, 4)
FORMS = ("float", "pruned", "dynamic int8", "static int8", "fp16")
# name → (model type, task, its config beside the shared sizes)
_SIZES = {
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
_VIT = {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
_GROUPS = {"num_key_value_heads": 2}
SUBJECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "feature-extraction", {}),
    "bert classifier": ("bert", "text-classification", {"num_labels": 5}),
    "distilbert": (
        "distilbert", "feature-extraction", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "albert": ("albert", "feature-extraction", {"embedding_size": 16}),
    "mpnet": ("mpnet", "feature-extraction", {}),
    "gpt2": ("gpt2", "text-generation", _GPT2),
    "llama": ("llama", "text-generation", _GROUPS),
    "qwen3": ("qwen3", "text-generation", _GROUPS | {"head_dim": 8}),
    "vit": ("vit", "image-classification", _VIT),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the gate made of one healthy graph; `strain` is the largest error by what is allowed."""

    family: str
    form: str
    processor: str
    threads: int
    seed: int
    passed: bool | None  # None: no such graph
    strain: float = 0.0
    worst: str = ""  # the check that came nearest to its bound, or why there is no graph

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What tells it from the others."""
        return self.family, self.form, self.processor, self.threads, self.seed


# --- in a process of its own --------------------------------------------------------------------


def survey(
    processor: str, threads: int, seed: int, skip: Sequence[tuple[str, str]] = ()
) -> Iterator[Outcome]:
    """Yield what the gate makes of every family in every form, as this process computes."""
    torch.set_num_threads(threads)
    for family, (kind, task, settings) in SUBJECTS.items():
        source = float_checkpoint(kind, task, _SIZES | settings, seed)
        for form in FORMS:
            if (family, form) not in skip:
                where = (family, form, processor, threads, seed)
                try:
                    yield Outcome(*where, *judge(source, form))
                except OnnxPressError as error:
                    yield Outcome(*where, None, worst=str(error)[:200])


def judge(source: Checkpoint, form: str) -> tuple[bool, float, str]:
    """Return whether the gate passes the graph of a form, its largest strain and where that is."""
    checkpoint, config = formed(source, form)
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for name, part in parts(checkpoint).items():
            path = Path(folder, f"{name}.onnx")
            write_model(build_graph(part, config), path)
            graphs[name] = part, path
        report = check_graphs(checkpoint, graphs)
    worst = report.worst()
    told = f"{worst.output} at {worst.case} ({worst.rule}, {worst.session})"
    return report.passed, worst.strain, told


def formed(source: Checkpoint, form: str) -> tuple[Checkpoint, ExportConfig]:
    """Return the model in a form, and how it is exported."""
    if form == "pruned":
        groups = find_groups(source.backbone)
        keep = {g.key: tuple(range(0, g.units, 2)) for g in groups}
        return apply_plan(source, PrunePlan(keep)), ExportConfig()
    if form.endswith("int8"):
        config = QuantizeConfig(form.removesuffix(" int8"))
        return quantize(source, config, Sampled(source)).checkpoint, ExportConfig()
    if form == "fp16":
        return in_precision(source, "fp16"), ExportConfig("portable", dtype="fp16")
    return source, ExportConfig()


# --- the whole ----------------------------------------------------------------------------------


def outcomes(journal: Journal, seeds: int, only: str | None = None) -> Iterator[Outcome]:
    """Yield the outcome of every graph, from the journal or from a process that computes so."""
    for seed in range(seeds):
        for processor in PROCESSORS:
            for threads in THREADS:
                if only is None or only == f"{processor}, {threads} threads":
                    yield from _of_process(journal, processor, threads, seed)


def _of_process(journal: Journal, processor: str, threads: int, seed: int) -> Iterator[Outcome]:
    done = []
    for family in SUBJECTS:
        for form in FORMS:
            found = journal.get(family, form, processor, threads, seed)
            if found is not None:
                done.append((family, form))
                yield Outcome(**found)
    if len(done) == len(SUBJECTS) * len(FORMS):
        return
    words = [sys.executable, "-m", "benchmarks.gate_healthy", "--survey", processor]
    words += ["--threads", str(threads), "--seed", str(seed), "--skip", json.dumps(done)]
    threaded = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threaded, **PROCESSORS[processor]}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            outcome = Outcome(**json.loads(line))
            journal.put(*outcome.key, value=asdict(outcome))
            yield outcome
    if child.returncode:
        raise OnnxPressError(
            f"the survey of {processor} with {threads} threads ended with exit code "
            f"{child.returncode}; see above. What is done is kept: run the command again"
        )


def markdown(found: Sequence[Outcome]) -> str:
    """Return the counts, the distribution of the largest strain, and every refusal."""
    tried = [outcome for outcome in found if outcome.passed is not None]
    refused = [outcome for outcome in tried if not outcome.passed]
    absent = [outcome for outcome in found if outcome.passed is None]
    lines = [
        "# Healthy graphs, and the parity gate",
        "",
        f"**{len(refused)} of {len(tried)} healthy graphs refused**; seeds "
        f"{', '.join(map(str, sorted({o.seed for o in found})))}.",
    ]
    if absent:
        counted = Counter((o.family, o.form, o.worst) for o in absent)
        lines += ["", "No such graph:", ""]
        lines += [f"- {a}, {b} ({n} times): {why}" for (a, b, why), n in counted.items()]
    for title, name in (("family", "family"), ("form", "form"), ("processor", "processor"),
                        ("threads", "threads")):  # fmt: skip
        lines += ["", f"| {title} | graphs | refused | largest strain: median | 95 % | most |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for value in dict.fromkeys(getattr(o, name) for o in tried):
            listed = [o for o in tried if getattr(o, name) == value]
            strains = np.quantile([o.strain for o in listed], [0.5, 0.95, 1])
            lines.append(
                f"| {value} | {len(listed)} | {sum(not o.passed for o in listed)} | "
                + " | ".join(f"{strain:.3g}" for strain in strains)
                + " |"
            )
    lines += ["", f"## Refused: {len(refused)}", ""]
    lines += [
        f"- {o.family}, {o.form}, {o.processor}, {o.threads} threads, seed {o.seed}: "
        f"{o.strain:.3g} × what is allowed, {o.worst}"
        for o in refused
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Survey what is not surveyed yet; print the tables and write them to OUT/healthy.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate_healthy", description=main.__doc__
    )
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="draws of weights, from 0 on")
    parser.add_argument("--only", help="one process, such as 'avx2, 2 threads'")
    for hidden, kind in (("survey", str), ("threads", int), ("seed", int), ("skip", json.loads)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.survey:
        skip = [(family, form) for family, form in given.skip]
        for outcome in survey(given.survey, given.threads, given.seed, skip):
            print(json.dumps(asdict(outcome)), flush=True)
        return
    journal = Journal(given.out, ["healthy graphs", versions(), SUBJECTS, FORMS, PROCESSORS])
    found: list[Outcome] = []
    try:
        for outcome in outcomes(journal, given.seeds, given.only):
            found.append(outcome)
            if not outcome.passed:
                print(outcome, file=sys.stderr, flush=True)
    except OnnxPressError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    page = markdown(found)
    if given.out is not None:
        (given.out / "healthy.md").write_text(page, "utf-8")
    print(page)


if __name__ == "__main__":
    main()
