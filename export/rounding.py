"""How far rounding may move a model's outputs: runs that round differently, and one that hardly does.

`Rounded` runs a module and adds to every result of arithmetic a random error of the size that a
careful but unlucky kernel would make; so several runs show how errors of that size spread through
the model (Monte Carlo arithmetic: Parker 1997; Verrou, Févotte and Lathuilière 2016). `Exact` runs
the same module with every float taken as float64, whatever casts it has inside, and so stands for
the true value.

The size of one error, u being half the distance from 1 to the next number of the result's type:

- of elementwise arithmetic, 2u of the result; where the textbook formula cancels (gelu, log, sine),
  2u of what is cancelled.
- of a sum over n terms, what adding them one after another leaves. Rounding errors of the partial
  sums S_j are as good as independent (Higham and Mary 2019), each u/√3 · |S_j|; where terms have no
  sign in common that makes 0.41 u √n ‖t‖, where they have the mean of the result, u √n / 3 · |sum|.
  Kernels that add in blocks or pairs, or in a wider type, are below that: which one a processor has
  does not matter.
- in half precision, the same in float32, which all runtimes compute in, and one correct rounding of
  the result, u/√3; formulas that cancel may be written out in half precision.
- of a normalisation, that of a variance found as E[x²] − E[x]², which runtimes use.

What depends on no weight and no float input is left alone: positions, counts and masks. A
position's bucket is decided by truncating a logarithm, and no runtime may decide it otherwise. So
are values near the type's limit, which stand for minus infinity in masks.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

RANDOM_WALK = 0.41  # 1 / √6: the partial sums of n terms without a common sign
CORRECT = 0.58  # 1 / √3: errors up to the last bit's half, all alike often, at most
_POOL = 1 << 20

_aten = torch.ops.aten

# Data that is moved, chosen or compared, not computed: nothing is rounded.
_MOVED_NAMES = """
    _to_copy to copy clone contiguous detach alias lift lift_fresh lift_fresh_copy view
    _unsafe_view reshape _reshape_alias expand expand_as unsqueeze squeeze permute transpose t
    slice select split unsafe_split split_with_sizes unsafe_split_with_sizes chunk unbind narrow
    as_strided unfold diagonal movedim flatten cat stack concat hstack vstack index index_select
    gather take take_along_dim embedding masked_select where masked_fill masked_scatter scatter
    slice_scatter select_scatter diagonal_scatter index_put _unsafe_index _unsafe_index_put
    index_copy index_fill fill zero zeros ones full empty empty_like empty_strided new_empty
    new_empty_strided new_zeros new_ones new_full zeros_like ones_like full_like scalar_tensor
    arange linspace eye tril triu repeat repeat_interleave tile roll flip rot90 pad
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
    pixel_shuffle pixel_unshuffle im2col relu relu6 neg abs sign floor ceil round trunc clamp
    clamp_min clamp_max hardtanh threshold maximum minimum max min amax amin topk sort argsort
    msort kthvalue max_pool1d max_pool2d max_pool2d_with_indices adaptive_max_pool2d
    _local_scalar_dense item resize set set_ dropout native_dropout bernoulli rand randn
    rand_like randn_like view_as_real view_as_complex real imag complex nan_to_num eq ne lt le
    gt ge isnan isinf isfinite one_hot bucketize searchsorted append
"""
_MOVED = frozenset(_MOVED_NAMES.split())


class Rounded(TorchDispatchMode):
    """While active, every result of arithmetic carries one more rounding error, drawn by `seed`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.pool: Tensor | None = None
        # by their storage, and held so that no other gets its place: floats that no weight went into
        self.counted: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and perturb what it rounds."""
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__.rstrip("_")
        counted = all(
            _place(item) in self.counted
            for item in tree_leaves((args, kwargs))
            if isinstance(item, Tensor) and item.is_floating_point()
        )
        before = None if counted else _BEFORE.get(name)
        if before is not None:
            args = before(self, *args)
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype in _FLOATS]
        for index, y in enumerate(results):
            if counted:
                self.counted[_place(y)] = y
            else:
                self.counted.pop(_place(y), None)
                if before is None and name not in _MOVED and not func.is_view and y.numel():
                    size = _SIZES.get(name, _elementwise) if index == 0 else _elementwise
                    self._perturb_(y, size, args, kwargs)
        return result

    def _perturb_(
        self, y: Tensor, size: "Size", args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        info = torch.finfo(y.dtype)
        wide = y if y.dtype == torch.float32 else y.float()
        error = size(self, wide, args, kwargs)
        if y.dtype == torch.float32 or size in _OF_FORMULAS:
            error.mul_(info.eps / 2)
        else:
            error.mul_(torch.finfo(torch.float32).eps / 2)
            error.add_(self.normal(wide).mul_(wide), alpha=CORRECT * info.eps / 2)
        error.masked_fill_(wide.abs() > info.max / 16, 0.0)
        y.copy_(wide + error)

    def normal(self, like: Tensor) -> Tensor:
        """Return random numbers of the normal distribution, in the shape of `like`.

        They are cut out of one long list at a random place: drawing each anew takes longer than a
        product of matrices.
        """
        if self.pool is None:
            self.pool = torch.randn(_POOL, generator=self.random)
        n = like.numel()
        start = int(torch.randint(0, _POOL, (), generator=self.random))
        repeats = -(-(start + n) // _POOL)
        long = self.pool if repeats == 1 else self.pool.repeat(repeats)
        return long[start : start + n].reshape(like.shape).clone()


Size = Callable[[Rounded, Tensor, tuple[Any, ...], Mapping[str, Any]], Tensor]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# --- what one operator's error may be, in units of u ----------------------------------------------


def _elementwise(mode: Rounded, y: Tensor, *_: Any) -> Tensor:
    return mode.normal(y).mul_(y).mul_(2)


def _of_input(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    """Return 2u of the input, whose shape is the output's: 1 + erf(x) cancels for x < 0."""
    return mode.normal(y).mul_(args[0].float()).mul_(2)


def _of_one(mode: Rounded, y: Tensor, *_: Any) -> Tensor:
    """Return 2u of 1 or of the result: sine and cosine near zero, logarithm near one."""
    return mode.normal(y).mul_(y.abs().clamp_min(1)).mul_(2)


_OF_FORMULAS: tuple[Size, ...] = (_of_input, _of_one)


def _product(mode: Rounded, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return the error of a (…, m, n) @ b (…, n, k) = y, summed over n one after another."""
    n = a.shape[-1]
    rows = a.float().norm(dim=-1, keepdim=True)  # (…, m, 1)
    columns = b.float().norm(dim=-2, keepdim=True)  # (…, 1, k)
    error = mode.normal(y).mul_(rows).mul_(columns).mul_(RANDOM_WALK)
    return error.add_(mode.normal(y).mul_(y).mul_(1 + math.sqrt(n) / 3))


def _mm(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    return _product(mode, args[0], args[1], y)


def _addmm(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    return _product(mode, args[1], args[2], y)


def _linear(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    return _product(mode, args[0], args[1].t(), y)


def _convolution(mode: Rounded, y: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    x, weight, rest = args[0], args[1], args[3:]
    n = weight.numel() // weight.shape[0]
    squares = _aten.convolution(x.float() ** 2, weight.float() ** 2, None, *rest)
    error = mode.normal(y).mul_(squares.clamp_min_(0).sqrt_()).mul_(RANDOM_WALK * math.sqrt(n))
    return error.add_(mode.normal(y).mul_(y).mul_(1 + math.sqrt(n) / 3))


def _sum(mode: Rounded, y: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """Return the error of a sum, or of a mean, over some axes of the input."""
    x = args[0].float()
    n = max(x.numel() // max(y.numel(), 1), 1)
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    size = x.norm() if axes in (None, []) else x.norm(dim=axes, keepdim=bool(keep))
    return (
        mode.normal(y)
        .mul_(size.reshape(y.shape))
        .mul_(RANDOM_WALK * math.sqrt(n))
        .add_(mode.normal(y).mul_(y).mul_(1 + math.sqrt(n) / 3))
    )


def _mean(mode: Rounded, y: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    n = max(args[0].numel() // max(y.numel(), 1), 1)
    return _sum(mode, y * n, args, kwargs).div_(n)


def _cumsum(mode: Rounded, y: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    axis = args[1]
    n = y.shape[axis]
    size = args[0].float().square().cumsum(axis).sqrt_()
    return (
        mode.normal(y)
        .mul_(size)
        .mul_(RANDOM_WALK * math.sqrt(n))
        .add_(mode.normal(y).mul_(y).mul_(1 + math.sqrt(n) / 3))
    )


def _variance(mode: Rounded, y: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """Return the error of E[x²] − E[x]²."""
    x = args[0].float()
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    n = max(x.numel() // max(y.numel(), 1), 1)
    squares = x.square().mean(dim=axes).reshape(y.shape)
    return mode.normal(y).mul_(squares).mul_(2 + math.sqrt(n) / 3)


def _softmax(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    x, axis = args[0].float(), args[1]
    error = mode.normal(y).mul_((2 + (x - x.amax(axis, keepdim=True)).abs()) * y)
    error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # masked: minus infinity times zero
    row = y.select(axis, 0).unsqueeze(axis)
    return error.add_(mode.normal(row).mul(math.sqrt(y.shape[axis]) / 3) * y)


def _log_softmax(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    axis = args[1]
    error = mode.normal(y).mul_(y.abs() + 2)
    row = y.select(axis, 0).unsqueeze(axis)
    return error.add_(mode.normal(row).mul(math.sqrt(y.shape[axis]) / 3))


def _normalized(mode: Rounded, y: Tensor, x: Tensor, axes: list[int], eps: float) -> Tensor:
    """Return the error of (x − mean) / √(variance + eps), times a weight, plus a bias: y."""
    n = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdim=True)
    squares = x.square().mean(axes, keepdim=True)
    variance = (squares - mean.square()).clamp_min_(0) + eps
    walk = 2 + math.sqrt(n) / 3
    scale = mode.normal(mean) * (0.5 * walk * (squares + mean.square()) / variance)
    shift = mode.normal(mean) * (walk * squares.sqrt() / variance.sqrt())
    spread = y.std(dim=axes, keepdim=True, correction=0)  # of the weight, as far as y shows it
    return mode.normal(y).mul_(y).mul_(3) + scale * y + shift * spread


def _layer_norm(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    axes = list(range(-len(args[1]), 0))
    return _normalized(mode, y, args[0].float(), axes, float(args[4]))


def _group_norm(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    batch, groups, eps = args[3], args[6], float(args[7])
    grouped = (batch, groups, -1)
    x = args[0].float().reshape(grouped)
    return _normalized(mode, y.reshape(grouped), x, [2], eps).reshape(y.shape)


def _norm(mode: Rounded, y: Tensor, args: tuple[Any, ...], _: Any) -> Tensor:
    n = max(args[0].numel() // max(y.numel(), 1), 1)
    return mode.normal(y).mul_(y).mul_(2 + math.sqrt(n) / 3)


_SIZES: dict[str, Size] = {
    "mm": _mm,
    "bmm": _mm,
    "matmul": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "linear": _linear,
    "convolution": _convolution,
    "sum": _sum,
    "mean": _mean,
    "cumsum": _cumsum,
    "var": _variance,
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "gelu": _of_input,
    "erf": _of_one,
    "sin": _of_one,
    "cos": _of_one,
    "log": _of_one,
    "log1p": _of_one,
    "exp": _of_one,
    "softplus": _of_one,
}


def _attention(
    mode: Rounded, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """Perturb what one operator of attention is given, as its products and softmax would round.

    A relative error of c in each number of a query moves a score by as much as summing its products
    one after another does, for c = 0.41 u √width; the weights add up over the keys likewise.
    """
    width, keys = query.shape[-1], key.shape[-2]
    added = torch.finfo(torch.float32).eps / torch.finfo(query.dtype).eps
    once = 1 if query.dtype == torch.float32 else CORRECT
    by_width = once + RANDOM_WALK * math.sqrt(width) * added
    by_keys = 2 * once + RANDOM_WALK * math.sqrt(keys) * added
    return (
        _moved(mode, query, by_width),
        _moved(mode, key, by_width),
        _moved(mode, value, by_keys),
        *rest,
    )


def _moved(mode: Rounded, x: Tensor, factor: float) -> Tensor:
    wide = x.float()
    error = mode.normal(wide).mul_(wide).mul_(factor * torch.finfo(x.dtype).eps / 2)
    return (wide + error).to(x.dtype)


_BEFORE: dict[str, Callable[..., tuple[Any, ...]]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}


# --- as if nothing were rounded -------------------------------------------------------------------


class Exact(TorchDispatchMode):
    """While active, every float is float64: weights as they are read, and casts to fewer bits too.

    The weights need no second copy of their size, since each is widened where it is used.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator on float64; what only looks at or looks up numbers, on them as they are."""
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._overloadpacket.__name__ in _LOOKUPS:
            return tree_map(_widened, func(*args, **kwargs))
        wide, options = tree_map(_widened, (args, kwargs))
        result = func(*wide, **options)
        for argument, given, made in zip(func._schema.arguments, args, wide):
            if argument.is_write and made is not given:
                given.copy_(made)  # a buffer that the forward keeps something in
        return result


_LOOKUPS = ("embedding", "index_select", "gather")  # a table has far more rows than are looked up


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _FLOATS else value
    return torch.float64 if value in _FLOATS else value


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Run what is inside in float64, new tensors included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Exact():
            yield
    finally:
        torch.set_default_dtype(before)
