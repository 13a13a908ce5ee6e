"""Embedding tables of 4 bits a number, block by block along each row.

The layout is that of ONNX Runtime's `GatherBlockQuantized`, which is that of `MatMulNBits` with rows for
outputs: number ≈ (value − zero point) × scale, with values in 0 … 15.
"""

import torch
from torch import Tensor, nn

from compress.quantize_config import EMBEDDING_BLOCK_SIZES
from compress.weight_only import dequantize_blocks, quantize_blocks

BITS = 4


def block_size(width: int, at_most: int) -> int | None:
    """Return the largest size of blocks that fill rows of `width` numbers; None where none does."""
    fitting = (size for size in EMBEDDING_BLOCK_SIZES if size <= at_most and width % size == 0)
    return max(fitting, default=None)


@torch.library.custom_op("onnxpress::gather_blocks", mutates_args=())
def gather_blocks(
    ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, block_size: int
) -> Tensor:
    """Return the rows `ids` (...) of a table, (..., width), in the scales' precision.

    packed (rows, width / 2) and zero_point (rows, blocks / 2, rounded up) hold two numbers a byte, the
    first in the low bits; scale (rows, blocks) is float.
    """
    width = 2 * packed.shape[1]
    chosen = (table[ids.flatten()] for table in (packed, scale, zero_point))
    values, steps, zeros = chosen
    blocks = values.unflatten(1, (-1, block_size // 2))
    rows = dequantize_blocks(blocks, steps, zeros, BITS, block_size, width)
    return rows.reshape(*ids.shape, width)


@gather_blocks.register_fake
def _(ids: Tensor, packed: Tensor, scale: Tensor, *_: object) -> Tensor:
    return scale.new_empty((*ids.shape, 2 * packed.shape[1]))


class PackedEmbedding(nn.Module):
    """An embedding table with rows of 4 bits a number, whose width is a multiple of `size`."""

    packed: Tensor  # (rows, width / 2) uint8
    scale: Tensor  # (rows, blocks) float32
    zero_point: Tensor  # (rows, blocks / 2, rounded up) uint8, packed

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, size: int
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx  # some models count positions from it
        self.block_size = size
        blocks = embedding_dim // size
        packed = torch.zeros(num_embeddings, embedding_dim // 2, dtype=torch.uint8)
        zeros = torch.zeros(num_embeddings, -(-blocks // 2), dtype=torch.uint8)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.ones(num_embeddings, blocks))
        self.register_buffer("zero_point", zeros)

    def quantize_(self, weight: Tensor) -> None:
        """Hold the float table `weight` (rows, width) as nearly as the bits allow."""
        packed, self.scale, self.zero_point = quantize_blocks(weight, BITS, self.block_size)
        self.packed = packed.flatten(1)

    def dequantize(self) -> Tensor:
        """Return the table (rows, width) that the module stands for, in the scales' precision."""
        return self(torch.arange(self.num_embeddings, device=self.packed.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to vectors (..., width)."""
        return gather_blocks(ids, self.packed, self.scale, self.zero_point, self.block_size)
