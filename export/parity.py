"""The gate: a graph that disagrees with its source is not published.

`export.tolerance` states the rule, `export.cases` what the graphs are tried on. Int8 graphs are
checked twice: first without the rounding of activations (`export.linearize`), under the float rule,
then as they ship, by their noise. A decoder is checked once more across calls, each given the cache
of the last (`export.stepwise`), and the weights are looked up among the source's (`export.weights`).
"""

import gc
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from compress.checkpoint import Checkpoint
from export.branches import switches, told
from export.bundle import read_graph
from export.cases import longest_case, parity_cases
from export.linearize import linearized
from export.localize import first_divergence
from export.sessions import open_session
from export.stepwise import check_across_calls
from export.tolerance import DRAWS, HOPELESS, NOISE, finding, pooled_errors, together
from export.trial import PADDING, SESSIONS, Case, Compared, Progress, Trial, compare, make_trial
from export.verdict import BROKEN, Check, ParityReport, joined
from export.weights import changed_epsilons, changed_ranges, changed_weights

TOGETHER = "all cases, each in units of its rounding"
_TRIES = 2  # cases on which the first module that is off is looked for, beside the worst
_SESSIONS = (("plain", False), ("optimized", True))


def check_graphs(
    checkpoint: Checkpoint,
    graphs: Mapping[str, tuple[Checkpoint, Path]],
    provider: str = "cpu",
    progress: Progress = lambda: None,
) -> ParityReport:
    """Compare all graphs that a checkpoint became, each with its part, and how they work together."""
    reports = [
        check_parity(part, path, provider, progress, graph)
        for graph, (part, path) in graphs.items()
    ]
    reports.append(ParityReport(tuple(check_across_calls(checkpoint, graphs, provider))))
    progress()
    return joined(reports)


def check_parity(
    part: Checkpoint,
    model: Path,
    provider: str = "cpu",
    progress: Progress = lambda: None,
    graph: str = "model",
) -> ParityReport:
    """Compare one graph with the checkpoint it was made of on every case, optimized and not."""
    stored = read_graph(model)
    checks = [
        Check.of((graph, "weights", "file", name), "same bits", (share, share))
        for name, share in changed_weights(part.module, stored)
    ]
    checks += [
        Check.of((graph, "weights", "file", name), "same bits", (float(off), float(off)))
        for name, off in (
            *changed_epsilons(part.module, stored),
            *changed_ranges(part.module, stored),
        )
    ]
    appends = any(node.op_type == "GroupQueryAttention" for node in stored.graph)
    del stored
    gc.collect()  # nodes and values hold each other, and the weights with them
    lengths = switches(part, longest_case(part)) if part.signature.has_sequence else []
    trial = make_trial(part, dict(parity_cases(part, not appends, lengths)), progress)
    with tempfile.TemporaryDirectory() as folder:
        plain = linearized(model, Path(folder, model.name)) if part.quantization else model
        for label, optimize in _SESSIONS:
            session = open_session(plain, provider, optimize=optimize, tf32=False)
            compared = compare(trial, session, progress)
            checks += _judge(trial, compared, graph, f"{provider} {label}")
            del session
        drift: dict[str, float] = {}
        if part.quantization:
            for label, optimize in _SESSIONS:
                session = open_session(model, provider, optimize=optimize, tf32=False)
                compared = compare(trial, session, progress)
                checks += _judge_noise(trial, compared, graph, f"{provider} {label}")
                drift = {f"{graph} {name}": value for name, value in compared.drift.items()}
                del session
        branch = _branch(trial, checks, lengths)
        diverges = None if branch else _diverges(trial, model, plain, checks, provider)
    return ParityReport(tuple(checks), diverges, drift, branch)


def _judge(trial: Trial, compared: Compared, graph: str, session: str) -> Iterator[Check]:
    """Yield the checks of one session by the float rule: of each case, and of all together.

    One case that all draws condemn is enough, so what comes after is told by the first draws.
    """
    rule = "float" if trial.dtype == torch.float32 else "half precision"
    condemned = False
    for output, expected in trial.expected.items():
        ratios = []
        for case, found in compared.found[output].items():
            told = compared.failures.get(case, rule)
            made = trial.judge(output, case, found, patient=not condemned)
            check = Check.judged((graph, case, session, output), told, made)
            scale = expected[case].scale
            condemned |= not check.passed and (scale.draws == DRAWS or check.strain > HOPELESS)
            if case != PADDING and np.isfinite(found.rms) and scale.rms:
                ratios.append(found.rms / scale.rms)
            yield check
        if ratios:
            mean, bound = together(ratios, SESSIONS * len(trial.expected))
            where = (graph, TOGETHER, session, output)
            yield Check.of(where, rule, (mean, 0.0), (bound, 0.0))


def _judge_noise(trial: Trial, compared: Compared, graph: str, session: str) -> Iterator[Check]:
    for output, expected in trial.expected.items():
        found = pooled_errors([compared.found[output][case].errors for case in trial.cases])
        noise = pooled_errors([expected[case].noise for case in trial.cases])
        allowed = NOISE * noise[0], 2 * NOISE * noise[1]
        told = next(iter(compared.failures.values()), "int8 noise")
        yield Check.of((graph, "all cases", session, output), told, found, allowed)
        if trial.fixed_steps and PADDING in compared.found[output]:
            moved = compared.found[output][PADDING]
            exact = finding(moved, expected[PADDING].scale, trial.comparisons)
            most = max(exact.rms_allowed, allowed[0]), max(exact.largest_allowed, allowed[1])
            yield Check.of((graph, PADDING, session, output), told, moved.errors, most)


def _branch(trial: Trial, checks: Iterable[Check], lengths: Sequence[int]) -> str | None:
    """Return that a graph is right on one side of a length alone, if that is what failed."""
    if not lengths:
        return None
    sizes = {name: _length(trial.part, case) for name, case in trial.cases.items()}
    judged = [c for c in checks if c.case in sizes and not c.rule.startswith(BROKEN)]
    for length in lengths:
        sides = {sizes[c.case] >= length for c in judged if not c.passed}
        if len(sides) == 1 and any(
            c.passed for c in judged if (sizes[c.case] >= length) not in sides
        ):
            return told(length)
    return None


def _length(part: Checkpoint, case: Case) -> int:
    """Return how many tokens a row has, those in the cache too."""
    return max(
        case[item.name].shape[axis]
        for item in part.signature.inputs
        for axis, name in item.axes
        if item.name in case and name in ("sequence", "total_sequence")
    )


def _diverges(
    trial: Trial, model: Path, plain: Path, checks: Iterable[Check], provider: str
) -> str | None:
    """Return the first module that is off, on the smallest case that shows it."""
    failed = [c for c in checks if not c.passed]
    if any(c.rule.startswith(BROKEN) for c in failed):
        return None  # the runtime's own words tell the operator
    numeric = [c for c in failed if c.case in trial.cases]
    noisy = [c for c in failed if c.rule == "int8 noise"]
    if numeric and not any("plain" in c.session for c in numeric):
        return "no module of the graph as written: only the optimized session is off"
    if not numeric and not noisy:
        return None
    if not numeric:
        case = min(trial.cases.values(), key=_size)
        return first_divergence(trial.exact, model, case, provider, rounded=trial.part)
    plainly = {c.case: c.strain for c in numeric if "plain" in c.session}
    # the small tell as much in less time, where their error is clear; the largest error surely is
    names = sorted(plainly, key=lambda name: _size(trial.cases[name]))[:_TRIES]
    for name in (*names, max(plainly, key=plainly.__getitem__)):
        if told := first_divergence(trial.exact, plain, trial.cases[name], provider):
            return told
    return None


def _size(case: Case) -> int:
    return sum(value.numel() for value in case.values())
