"""What the exporter could write in each place, as tiny graphs: the data of `benchmarks.operators`.

A new alternative is a function that adds its nodes to a `Graph`, and an entry in its module's `CHOICES`.
"""

from benchmarks.operator_choices import activations, attention, linear, norms, positions
from benchmarks.operator_choices.choice import Alternative, Choice, build
from benchmarks.operator_choices.graph import COMPARED, SHARED

__all__ = ["CHOICES", "COMPARED", "SHARED", "Alternative", "Choice", "build"]

CHOICES = (
    *norms.CHOICES,
    *attention.CHOICES,
    *linear.CHOICES,
    *activations.CHOICES,
    *positions.CHOICES,
)
