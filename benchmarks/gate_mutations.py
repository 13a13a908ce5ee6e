"""Does the parity gate notice? Random single mutations of graphs, and what became of them.

    python -m benchmarks.gate_mutations --count 200 -o OUT

Small random models of several families are exported, one thing in a graph is changed, and the whole
gate runs on what comes out. A change that it misses is tried on a large sample that the gate has not
seen: if no output moves by more than its own rounding error, the change is *equivalent*, else the
gate has *missed* it. Changes that leave no runnable graph are *refused*, and count neither way.
OUT keeps what is done: a run that was stopped goes on, and a larger count adds to a smaller one.
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
import onnx_ir as ir
import torch

from benchmarks.gate_subjects import FAMILIES, HEADS, TWIN_KINDS, Subject, build, twin
from benchmarks.journal import Journal
from benchmarks.mutations import KINDS, Mutation, Random
from benchmarks.row_mutations import ROW_KINDS
from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.quantize import dequantized
from compress.signature import named_outputs
from compress.tokens import tokens_of
from compress.versions import versions
from export.linearize import linearized
from export.parity import check_graphs
from export.sessions import open_session, run

EVERY_KIND: dict[str, Mutation] = {**KINDS, **ROW_KINDS}
NEW_KINDS = (*ROW_KINDS, *TWIN_KINDS)
_BROKEN = "does not run"  # how the gate's rules begin where the runtime refused a graph


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
    if kind in TWIN_KINDS:
        made = twin(subject, kind, random)
        model, told = (None, None) if made is None else (made[0], (made[1], ""))
    else:
        model = subject.graph() if subject.content else None
        told = None if model is None else EVERY_KIND[kind](model, random)
    if model is None or told is None or (family, kind, told[0]) in seen:
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
    if all(c.rule.startswith(_BROKEN) for c in report.checks if c.session != "file"):
        return Outcome(
            family, kind, site, module, "refused", tuple(rules), proof=failed[0].rule[:200]
        )
    if failed:
        where = (report.diverges or "").split(" (")[0]
        named = None
        if module and report.diverges:
            named = f"{where}.".startswith(f"{module}.") or f"{module}.".startswith(f"{where}.")
        return Outcome(family, kind, site, module, "caught", tuple(rules), named)
    if not subject.content:
        proof = "there is no right graph to hold it to"
        return Outcome(family, kind, site, module, "missed", proof=proof)
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


# two errors of one array: root mean square and largest
_Errors = tuple[float, float]


def errors(found: np.ndarray, y: np.ndarray) -> _Errors:
    """Return how far `found` is off, infinite where shapes or finiteness differ."""
    if found.shape != y.shape:
        return float("inf"), float("inf")
    difference = found.astype(np.float64) - y
    if not difference.size:
        return 0.0, 0.0
    if not np.isfinite(difference).all():
        return float("inf"), float("inf")
    return float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())


def pooled_errors(found: list[_Errors]) -> _Errors:
    """Return the root mean square of the first, and the largest of the second."""
    return float(np.sqrt(np.mean([rms**2 for rms, _ in found]))), max(e for _, e in found)


# --- the whole ----------------------------------------------------------------------------------


def mutations(count: int, seed: int, journal: Journal | None = None) -> Iterator[Outcome]:
    """Yield outcomes until `count` different mutated graphs could be run.

    What the journal holds is not tried again. Mutation i is drawn from the seed [seed, i], and every
    other one is of a new kind where the family has one left.
    """
    journal = journal or Journal(None, None)
    subjects: dict[str, Subject] = {}
    seen: set[tuple[str, str, str]] = set()
    names = [*FAMILIES, *HEADS]
    ran, index = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while ran < count:
            family, number, index = names[index % len(names)], index, index + 1
            done = journal.get(number)
            if done is None:
                if family not in subjects:
                    subjects[family] = build(family)
                found = _one(subjects[family], family, [seed, number], Path(folder), seen)
                done = None if found is None else asdict(found)
                journal.put(number, value=done or {})
            if not done:  # all that differs of this family has been tried
                continue
            outcome = Outcome(**{**done, "rules": tuple(done["rules"])})
            seen.add((family, outcome.kind, outcome.site))
            ran += outcome.verdict != "refused"
            yield outcome


def _one(
    subject: Subject,
    family: str,
    seed: list[int],
    folder: Path,
    seen: set[tuple[str, str, str]],
) -> Outcome | None:
    random = np.random.default_rng(seed)
    kinds = [str(kind) for kind in random.permutation([*EVERY_KIND, *TWIN_KINDS])]
    if random.integers(2) or not subject.content:
        kinds.sort(key=lambda kind: kind not in NEW_KINDS)  # stable: each part as it was drawn
    for kind in kinds:
        outcome = judge(subject, family, kind, random, folder, seen)
        if outcome is not None:
            return outcome
    return None


def summary(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """Return the counts per kind, the shares and every mutation that was not caught."""
    kinds: dict[str, dict[str, int]] = {}
    families: dict[str, dict[str, int]] = {}
    for field, names, table in (
        ("kind", (*EVERY_KIND, *TWIN_KINDS), kinds),
        ("family", (*FAMILIES, *HEADS), families),
    ):
        for name in names:
            listed = [o for o in outcomes if getattr(o, field) == name]
            counted = Counter(o.verdict for o in listed)
            if listed:
                table[name] = {**counted, "caught by outputs alone": sum(map(_by_outputs, listed))}
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
        "families": families,
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
    ]
    for title, rows in (("kind", report["kinds"]), ("family", report["families"])):
        lines += [
            "",
            f"| {title} | " + " | ".join(columns) + " |",
            "|---|" + "---:|" * len(columns),
            *(
                f"| {name} | " + " | ".join(str(row.get(c, 0)) for c in columns) + " |"
                for name, row in rows.items()
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
    journal = Journal(
        options.out, ["gate mutations", options.seed, versions(), *EVERY_KIND, *FAMILIES, *HEADS]
    )
    for outcome in mutations(options.count, options.seed, journal):
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
