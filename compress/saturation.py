"""Whether this processor's int8 kernels saturate.

Products of uint8 and int8 are added up in 32 bits by instructions made for it: VNNI and AMX on x86,
the dot product on ARM. Older x86 processors add them in pairs, in 16 bits, and cut off what does not
fit: 255 × 127 × 2 is twice too large. ONNX Runtime takes whichever there is.
"""

_X86 = ("x86_64", "i386", "i686")
_EXACT = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")

# what the command says where `saturates` decided
NOTE = (
    "this processor cuts off sums of int8 products (it has no VNNI), so weights got 7 bits; "
    "for a graph that runs elsewhere add --no-reduce-range"
)


def saturates() -> bool:
    """Return whether int8 kernels here cut sums off, so that weights should have a reduced range.

    It is the machine that quantizes which is asked. A graph for another one is told by the setting
    `reduce_range`.
    """
    import torch

    found = torch.cpu.get_capabilities()
    return found["architecture"] in _X86 and not any(found.get(name) for name in _EXACT)
