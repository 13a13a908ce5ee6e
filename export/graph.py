"""From a checkpoint to an ONNX graph: traced by PyTorch, translated, then shaped for its target."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from calib_data.errors import ExportError
from compress.checkpoint import Checkpoint
from compress.config import StageConfig, one_of, require
from compress.fresh import unchanged
from compress.quantize_config import check_target
from compress.signature import Signature, named_outputs
from export.cached_seq2seq import branch_on_cache_
from export.decoding import IN_PLACE
from export.passes import PASSES
from export.precision import DTYPES
from export.reasons import reason
from export.translation import translations

OPSETS = range(18, 25)
_TRACED_PAST = 5
MODULE = "onnxpress.module"  # metadata of a node: the PyTorch module it comes from


@dataclass(frozen=True)
class ExportConfig(StageConfig):
    """What the graph is for."""

    target: str = "cpu"  # portable: as traced; cpu, cuda: shaped for ONNX Runtime's provider
    opset: int = 23  # the first with an Attention operator
    dtype: str = "fp32"  # of weights, float inputs and cache

    def __post_init__(self) -> None:
        one_of("--target", self.target, tuple(PASSES))
        require(
            self.opset in OPSETS, f"--opset must be {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}"
        )
        one_of("--dtype", self.dtype, tuple(DTYPES))
        require(
            self.dtype == "fp32" or self.target != "cpu",
            f"--dtype {self.dtype} does not fit --target cpu, whose provider computes in float32; "
            "use --target cuda or portable",
        )


class _Positional(nn.Module):
    """Takes the inputs in the signature's order and returns the outputs as a tuple."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.signature = signature

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the signature's order."""
        outputs = named_outputs(self.module, dict(zip(self.signature.names, inputs)))
        return tuple(outputs[name] for name in self.signature.outputs)


def build_graph(checkpoint: Checkpoint, config: ExportConfig) -> ir.Model:
    """Return the checkpoint as an ONNX graph with dynamic axes, shaped for the target.

    Raises `ConfigError` for a quantized one of a scheme that the target cannot run fast, `ExportError`
    with PyTorch's own reason where tracing or translation fails.
    """
    if checkpoint.quantization:
        check_target(checkpoint.quantization["scheme"], config.target)
    model = _traced(checkpoint, config.opset, translations(config.target))
    for apply_pass_ in PASSES[config.target]:
        apply_pass_(model)
    branch_on_cache_(model)
    _alias_(model, "token_embeddings", "last_hidden_state")
    _tidy_(model, checkpoint.signature)
    return model


def plain_graph(checkpoint: Checkpoint, opset: int = 18) -> ir.Model:
    """Return what PyTorch's exporter makes of the checkpoint by itself, to compare with `build_graph`.

    Raises `ExportError` as that does.
    """
    return _traced(checkpoint, opset, {})


def _traced(
    checkpoint: Checkpoint, opset: int, translated: Mapping[Any, Callable[..., Any]]
) -> ir.Model:
    """Return the checkpoint as PyTorch exports it, its operators replaced as `translated` says."""
    signature = checkpoint.signature
    sample = signature.sample(
        batch=2,
        sequence=_traced_length(signature),
        ragged=True,
        past=_TRACED_PAST * signature.has_past,
    )
    axes = tuple({a: torch.export.Dim.DYNAMIC for a, _ in item.axes} for item in signature.inputs)
    module = _Positional(checkpoint.module, signature).eval()
    try:
        with _silence(), unchanged(module), _without_cache(checkpoint), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                tuple(sample[name] for name in signature.names),
                dynamo=True,
                opset_version=opset,
                input_names=list(signature.names),
                output_names=list(signature.outputs),
                dynamic_shapes=(axes,),
                custom_translation_table=dict(translated),
                verbose=False,
            )
    except Exception as error:  # torch.export and the translator raise many unrelated types
        raise ExportError(
            f"{type(checkpoint.backbone).__name__} cannot be exported: {reason(checkpoint, error)}"
        ) from error
    traced: ir.Model = program.model
    return traced


def _traced_length(signature: Signature) -> int:
    """Return a length that no weight's size is likely to equal, within the model's positions."""
    return min(11, (signature.longest or 99) - _TRACED_PAST * signature.has_past)


def _tidy_(model: ir.Model, signature: Signature) -> None:
    """Drop what nothing uses and what tells of the machine; name axes and modules."""
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    scopes = {node: _module_of(node) for node in model.graph.all_nodes()}
    common.ClearMetadataAndDocStringPass()(model)  # the tracer writes source paths there
    for node, scope in scopes.items():
        if scope:
            node.metadata_props[MODULE] = scope
    for value in model.graph.inputs:
        value.metadata_props.clear()
    _name_axes_(model, signature)
    if signature.has_past and _appends_in_place(model):
        model.metadata_props[IN_PLACE] = "past and present may share a buffer with room for more"
    model.producer_name, model.producer_version = "onnxpress", None


def _name_axes_(model: ir.Model, signature: Signature) -> None:
    """Call the inputs' axes what the signature calls them, and the outputs' after the inputs'.

    Clients that make room for the outputs beforehand read their sizes from these names.
    """
    by_name = {item.name: dict(item.axes) for item in signature.inputs}
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        if value.shape is not None:
            axes = by_name[str(value.name)]
            for index, axis in axes.items():
                names.setdefault(str(value.shape[index]), axis)
            value.shape = ir.Shape([axes.get(i, size) for i, size in enumerate(value.shape)])
    for value in model.graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    size if isinstance(size, int) or size.value is None
                    else re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.value)
                    for size in value.shape
                ]
            )  # fmt: skip


def _alias_(model: ir.Model, name: str, other: str) -> None:
    """Give the output `name` a second name, where there is one: clients differ in what they ask for.

    sentence-transformers' own graphs say `token_embeddings`, optimum's client wants the other.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    if name in outputs and other not in outputs:
        node = ir.node("Identity", [outputs[name]])
        node.outputs[0].name = other
        node.outputs[0].shape, node.outputs[0].type = outputs[name].shape, outputs[name].type
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])


def _appends_in_place(model: ir.Model) -> bool:
    """Whether every cache input goes straight into an operator that appends to it."""
    past = [v for v in model.graph.inputs if str(v.name).startswith("past_key_values.")]
    users = [[use.node.op_type for use in value.uses()] for value in past]
    return all(names == ["GroupQueryAttention"] for names in users)


def _module_of(node: ir.Node) -> str:
    """Return the dotted path of the innermost PyTorch module that a node was traced in."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = scopes.strip("[]").replace("'", "").split(", ")[:-1]
    inside = [name for name in names if name.startswith("module.")]  # of the wrapper's one child
    return inside[-1].removeprefix("module.") if inside else ""


@contextlib.contextmanager
def _without_cache(checkpoint: Checkpoint) -> Iterator[None]:
    """Trace without a key/value cache: these graphs do not return one."""
    config = checkpoint.config
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the tracer's prints, warnings and logs off the terminal; errors are raised anyway."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
