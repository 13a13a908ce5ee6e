"""The one family of errors that users see, each with its documented exit code.

It lives in the lowest package so that every layer can raise it; the command line
turns an instance into one line on stderr and exits with `exit_code`.
"""


class OnnxPressError(Exception):
    """A mistake or a condition that the user can act on: one line, cause and cure."""

    exit_code = 1


class ConfigError(OnnxPressError):
    """A setting outside its range, or settings that contradict each other."""

    exit_code = 2


class ParityError(OnnxPressError):
    """A graph disagrees with its source."""

    exit_code = 3


class ModelError(OnnxPressError):
    """A model that cannot be read, or is not what the stage needs."""

    exit_code = 4


class DataError(OnnxPressError):
    """A data set that cannot be read, or is not what the task needs."""

    exit_code = 4


class ProviderError(OnnxPressError):
    """An execution provider was asked for and not obtained."""

    exit_code = 5


class BudgetError(OnnxPressError):
    """A quantized model is worse, or a pruned one slower, than it may be; the best found was written."""

    exit_code = 6


class DestinationError(OnnxPressError):
    """The result cannot be written: it exists already, or the place is full or read-only."""

    exit_code = 8


class ExportError(OnnxPressError):
    """The model cannot be written as an ONNX graph."""

    exit_code = 9


class TrainingError(OnnxPressError):
    """Training stopped: the loss is not finite, or a batch does not fit."""

    exit_code = 10
