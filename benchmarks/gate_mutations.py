"""Does the parity gate notice? Random single mutations of graphs, and what became of them.

    python -m benchmarks.gate_mutations --count 200 -o OUT

Small random models of several families are exported, one thing in a graph is changed, and the whole
gate runs on what comes out. A change that it misses is tried on a large sample that the gate has not
seen: if no output moves by more than its own rounding error, the change is *equivalent*, else the
gate has *missed* it. Changes that leave no runnable graph are *refused*, and count neither way.
"""

import argparse
import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers

from benchmarks.mutations import KINDS, Random
from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.quantize import QuantizeConfig, dequantized, quantize
from compress.signature import named_outputs, transformer_signature
from compress.tasks import get_task
from compress.tokens import tokens_of
from compress.versions import versions
from export.graph import ExportConfig, build_graph
from export.linearize import linearized
from export.parity import check_graphs
from export.parts import parts
from export.sessions import open_session, run
from export.tolerance import errors, pooled_errors
from export.verdict import BROKEN

_TEXT = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
_VIT = {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
# name → (model type, task, config, quantization scheme, opset)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str | None, int]] = {
    "encoder": ("bert", "feature-extraction", _TEXT | _SIZES, None, 23),
    "encoder, opset 18": ("bert", "feature-extraction", _TEXT | _SIZES, None, 18),
    "classifier": ("bert", "text-classification", _TEXT | _SIZES | {"num_labels": 5}, None, 23),
    "decoder": ("gpt2", "text-generation", _TEXT | _GPT2, None, 23),
    "rotary decoder": (
        "llama", "text-generation", _TEXT | _SIZES | {"num_key_value_heads": 2}, None, 23,
    ),
    "vision": ("vit", "image-classification", _SIZES | _VIT, None, 23),
    "int8 encoder": ("bert", "feature-extraction", _TEXT | _SIZES, "dynamic", 23),
    "int8 decoder": ("gpt2", "text-generation", _TEXT | _GPT2, "dynamic", 23),
    "int8 vision": ("vit", "image-classification", _SIZES | _VIT, "dynamic", 23),
    "static encoder": ("bert", "feature-extraction", _TEXT | _SIZES, "static", 23),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """An exported model, ready to be mutated."""

    checkpoint: Checkpoint
    part: Checkpoint
    content: bytes

    def graph(self) -> ir.Model:
        """Return a fresh copy of the graph."""
        return ir.from_proto(onnx.load_from_string(self.content))


@dataclass(frozen=True)
class Outcome:
    """One mutation and what the gate made of it."""

    family: str
    kind: str
    site: str
    module: str
    verdict: str  # caught, equivalent, missed or refused
    rules: tuple[str, ...] = ()  # that failed
    named: bool | None = None  # whether the report names the module that was touched
    proof: str = ""


class _Sampled:
    """Calibration data: what the model's signature calls valid inputs."""

    fingerprint = "sampled"

    def __init__(self, checkpoint: Checkpoint) -> None:
        samples = (checkpoint.signature.sample(8, 16, seed=seed, ragged=True) for seed in range(4))
        self._batches = list(samples)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        return iter(self._batches)


def build(family: str) -> Subject:
    """Return the exported model of one family, its weights drawn as large as trained ones."""
    kind, task, settings, scheme, opset = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, get_task(task).auto_class).from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(3)
            else:
                value.add_(torch.randn_like(value), alpha=0.1)
    model = model.eval()
    checkpoint = Checkpoint(model, task, transformer_signature(model, model, None))
    if scheme is not None:
        checkpoint = quantize(checkpoint, QuantizeConfig(scheme), _Sampled(checkpoint)).checkpoint
    (part,) = parts(checkpoint).values()
    graph = build_graph(part, ExportConfig(opset=opset))
    return Subject(checkpoint, part, bytes(ir.to_proto(graph).SerializeToString()))


# --- verdicts -----------------------------------------------------------------------------------

_SHIPPED = "as shipped, "


def judge(
    subject: Subject,
    family: str,
    kind: str,
    random: Random,
    folder: Path,
    seen: set[tuple[str, str, str]],
) -> Outcome | None:
    """Mutate one thing and run the gate; None where there is nothing of this kind that was not seen."""
    model = subject.graph()
    told = KINDS[kind](model, random)
    if told is None or (family, kind, told[0]) in seen:
        return None
    seen.add((family, kind, told[0]))
    site, module = told[0], told[1].removeprefix("backbone.")
    path = folder / "mutated.onnx"
    try:
        ir.save(model, path)
        report = check_graphs(subject.checkpoint, {"model": (subject.part, path)})
    except ModelError as error:
        return Outcome(family, kind, site, module, "refused", proof=str(error)[:200])
    failed = [check for check in report.checks if not check.passed]
    rules = sorted({check.rule.split(":")[0] for check in failed})
    if all(c.rule.startswith(BROKEN) for c in report.checks if c.session != "file"):
        return Outcome(
            family, kind, site, module, "refused", tuple(rules), proof=failed[0].rule[:200]
        )
    if failed:
        where = (report.diverges or "").split(" (")[0]
        named = None
        if module and report.diverges:
            named = f"{where}.".startswith(f"{module}.") or f"{module}.".startswith(f"{where}.")
        return Outcome(family, kind, site, module, "caught", tuple(rules), named)
    equivalent, proof = prove(subject, path, folder)
    verdict = "equivalent" if equivalent else "missed"
    return Outcome(family, kind, site, module, verdict, proof=proof)


def prove(subject: Subject, mutated: Path, folder: Path) -> tuple[bool, str]:
    """Return whether no output moves by more than rounding, on a sample that the gate has not seen.

    Two correct graphs, each off by e, are √2 e apart, and at most 2 e in one element. An int8 graph
    is tried without its run-time rounding first.
    """
    original = folder / "original.onnx"
    original.write_bytes(subject.content)
    graphs = {"": (original, mutated)}
    if subject.part.quantization:
        paths = [linearized(path, folder / f"exact-{path.name}") for path in (original, mutated)]
        graphs = {"": (paths[0], paths[1])}
        graphs[_SHIPPED] = (original, mutated)
    part = dequantized(subject.part) if subject.part.quantization else subject.part
    double = copy.deepcopy(part.module).double()
    tokens = tokens_of(part)
    moved: dict[str, list[tuple[float, float]]] = {}
    rounding: dict[str, list[tuple[float, float]]] = {}
    sessions = {
        label: [open_session(path, optimize=False) for path in pair]
        for label, pair in graphs.items()
    }
    for case in _sample(part):
        with torch.inference_mode():
            exact = named_outputs(double, {k: _double(v) for k, v in case.items()})
        for label, pair in sessions.items():
            before, after = (run(session, case) for session in pair)
            for output in part.signature.outputs:
                a, b, y = (
                    tokens.real(output, array, case)
                    for array in (before[output], after[output], exact[output].numpy())
                )
                moved.setdefault(label + output, []).append(errors(b, a.astype(np.float64)))
                rounding.setdefault(label + output, []).append(errors(a, y))
    count = len(next(iter(moved.values())))
    largest = 0.0
    for output, listed in moved.items():
        difference, own = pooled_errors(listed), pooled_errors(rounding[output])
        told = (
            f"{output} moves by {difference[0]:.2g} rms, {difference[1]:.2g} at most; "
            f"its own error is {own[0]:.2g} and {own[1]:.2g}"
        )
        if output.startswith(_SHIPPED):
            # its own error is the quantization: only where nothing else moves must this stand still
            if difference != (0.0, 0.0) and not largest:
                return False, told
        elif difference[0] > 2**0.5 * own[0] or difference[1] > 2 * own[1]:
            return False, told
        largest = max(largest, difference[1])
    told = f"moves by {largest:.2g} at most" if largest else "every bit is the same"
    return True, f"{told}, over {count} other batches"


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _sample(part: Checkpoint) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield inputs that the gate has not used: other seeds, lengths and pasts."""
    random = np.random.default_rng(12345)
    for seed in range(1000, 1060):
        if not part.signature.has_sequence:
            yield part.signature.sample(16, seed=seed)
            continue
        longest = part.signature.longest or 48
        past = int(random.integers(longest - 1)) if part.signature.has_past and seed % 2 else 0
        length = 1 if past else int(random.integers(1, longest + 1))
        yield part.signature.sample(7, length, seed=seed, ragged=past + length > 1, past=past)


# --- the whole ----------------------------------------------------------------------------------


def mutations(count: int, seed: int) -> Iterator[Outcome]:
    """Yield outcomes until `count` different mutated graphs could be run."""
    subjects: dict[str, Subject] = {}
    seen: set[tuple[str, str, str]] = set()
    names = list(FAMILIES)
    ran, index = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while ran < count:
            random = np.random.default_rng([seed, index])
            family, index = names[index % len(names)], index + 1
            if family not in subjects:
                subjects[family] = build(family)
            outcome = None
            for kind in random.permutation(list(KINDS)):
                outcome = judge(subjects[family], family, str(kind), random, Path(folder), seen)
                if outcome is not None:
                    break
            assert outcome is not None  # every graph has weights
            ran += outcome.verdict != "refused"
            yield outcome


def summary(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """Return the counts per kind, the shares and every mutation that was not caught."""
    kinds = {}
    for kind in KINDS:
        verdicts = Counter(o.verdict for o in outcomes if o.kind == kind)
        by_outputs = sum(_by_outputs(o) for o in outcomes if o.kind == kind)
        if verdicts:
            kinds[kind] = {**verdicts, "caught by outputs alone": by_outputs}
    verdicts = Counter(o.verdict for o in outcomes)
    judged = verdicts["caught"] + verdicts["missed"]
    named = [o.named for o in outcomes if o.named is not None]
    return {
        "seed": seed,
        "versions": versions(),
        "tried": len(outcomes),
        **{name: verdicts[name] for name in ("caught", "missed", "equivalent", "refused")},
        "share": verdicts["caught"] / judged if judged else None,
        "share by outputs alone": sum(map(_by_outputs, outcomes)) / judged if judged else None,
        "module named": {"right": sum(named), "of": len(named)},
        "kinds": kinds,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def _by_outputs(outcome: Outcome) -> bool:
    return outcome.verdict == "caught" and set(outcome.rules) != {"same bits"}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the summary as a page."""
    columns = ("caught", "caught by outputs alone", "missed", "equivalent", "refused")
    lines = [
        "# Mutations of graphs, and the parity gate",
        "",
        f"`python -m benchmarks.gate_mutations --count {report['tried'] - report['refused']} "
        f"--seed {report['seed']}`",
        "",
        f"{report['caught']} caught, {report['missed']} missed: **{report['share']:.1%}** "
        f"({report['share by outputs alone']:.1%} by the outputs alone, without comparing weights). "
        f"{report['equivalent']} more change no output beyond its rounding, and {report['refused']} "
        "left no graph that runs. The report named the module that was touched, one inside it or "
        f"one around it in {report['module named']['right']} of {report['module named']['of']} cases.",
        "",
        "| kind | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| {kind} | " + " | ".join(str(row.get(c, 0)) for c in columns) + " |"
            for kind, row in report["kinds"].items()
        ),
    ]
    for verdict in ("missed", "equivalent"):
        listed = [o for o in report["outcomes"] if o["verdict"] == verdict]
        lines += ["", f"## {verdict.capitalize()}: {len(listed)}", ""]
        lines += [f"- {o['family']}, {o['kind']}: {o['site']}; {o['proof']}" for o in listed]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write `mutations.json` and `mutations.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for outcome in mutations(options.count, options.seed):
        outcomes.append(outcome)
        if outcome.verdict != "caught":
            print(f"{len(outcomes)} {outcome}", flush=True)
    report = summary(outcomes, options.seed)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "mutations.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "mutations.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
