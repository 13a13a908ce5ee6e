"""Where a pruning run of several steps keeps what is done, so that a killed one goes on.

A plan is chosen by times, which no second measurement repeats: it is kept as soon as it is carried out,
with the weights; and so are those that healing made of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calib_data.errors import DestinationError, ModelError

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.plan import PrunePlan
    from compress.workspace import Workspace


@dataclass
class Progressed:
    """How far a run has come: the checkpoint, the plans that made it, and what was told of them."""

    checkpoint: "Checkpoint"
    plans: "list[PrunePlan]"
    told: list[dict[str, Any]]  # by round
    healed: int = 0  # rounds whose healing is done


class RoundStates:
    """The states of one run in a workspace; without one nothing is kept."""

    def __init__(self, workspace: "Workspace | None", settings: Mapping[str, Any]) -> None:
        """`settings` are all that a run must have in common with the one that it goes on from.

        Raises `DestinationError` for a state that may be neither continued nor replaced, `ConfigError`
        for one of another run.
        """
        self._workspace, self._settings = workspace, settings
        self._resumed = False
        if workspace is None or not workspace.states():
            return
        if not (workspace.resume or workspace.overwrite):
            raise DestinationError(
                f"{workspace.path} holds an unfinished run; go on with --resume, or start anew with "
                "--overwrite"
            )
        self._resumed = workspace.claim(settings)

    def load(self, source: "Checkpoint") -> Progressed:
        """Return how far an earlier run has come from `source`, or the start."""
        from compress.apply_plan import apply_plan
        from compress.plan import PrunePlan

        if not self._resumed or self._workspace is None:
            return Progressed(source, [], [])
        state = self._workspace.load()
        plans = [PrunePlan.from_json(plan) for plan in state.plain["plans"]]
        made = source
        for plan in plans:
            made = apply_plan(made, plan)
        missing, unexpected = made.module.load_state_dict(dict(state.tensors), strict=False)
        if unexpected or set(missing) - _shared(made):
            raise ModelError(
                f"{state.directory} does not hold the weights of its plan; start anew with --overwrite"
            )
        made = replace(made, lineage=tuple(state.plain["lineage"]))
        return Progressed(made, plans, state.plain["told"], state.plain["healed"])

    def save(self, progressed: Progressed) -> None:
        """Keep how far the run has come."""
        from compress.checkpoint import weights_of
        from compress.processes import is_main

        if self._workspace is None or not is_main():
            return
        if not self._workspace.states():
            self._workspace.claim(self._settings)
        weights = weights_of(progressed.checkpoint.module)
        self._workspace.begin()
        self._workspace.commit(
            len(progressed.plans) + progressed.healed,
            {name: value.detach().cpu().contiguous() for name, value in weights.items()},
            {
                "plans": [plan.to_json() for plan in progressed.plans],
                "told": progressed.told,
                "healed": progressed.healed,
                "lineage": list(progressed.checkpoint.lineage),
            },
        )


def _shared(checkpoint: "Checkpoint") -> set[str]:
    """Return the names of tensors that are others under a second name."""
    from compress.checkpoint import weights_of

    return set(checkpoint.module.state_dict()) - set(weights_of(checkpoint.module))
