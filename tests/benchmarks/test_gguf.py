import struct
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gguf import dequantize, read_gguf
from calib_data.errors import ModelError

# `ggml-common.h`: a block of Q4_1 is a half d, a half m and 16 bytes; number i is d × q + m, where q is
# the low half of byte i for the first 16, and the high half of byte i − 16 for the others
PACKED = bytes((15 - i) << 4 | i for i in range(16))
Q4_1 = struct.pack("<ee", 0.5, -1.25) + PACKED
Q4_1_NUMBERS = [0.5 * i - 1.25 for i in range(16)] + [0.5 * (15 - i) - 1.25 for i in range(16)]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf() -> bytes:
    """A file with three values and two tensors, the second of 2 rows of 32."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 2, 3)
    content += text("name") + struct.pack("<I", 8) + text("naïve")
    content += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    content += text("rate") + struct.pack("<If", 6, 0.25)
    content += text("bias") + struct.pack("<IQIQ", 1, 3, 0, 0)
    content += text("weight") + struct.pack("<IQQIQ", 2, 32, 2, 3, 32)
    content += bytes(-len(content) % 32)
    return content + struct.pack("<3f", 1, 2, 3) + bytes(20) + Q4_1 * 2


def test_blocks_become_the_numbers_of_the_format() -> None:
    assert dequantize(Q4_1, 3).tolist() == Q4_1_NUMBERS
    q4_0 = struct.pack("<e", 0.5) + PACKED
    assert dequantize(q4_0, 2).tolist() == [0.5 * (i - 8) for i in (*range(16), *range(15, -1, -1))]
    q8_0 = struct.pack("<e32b", 0.25, *range(-16, 16))
    assert dequantize(q8_0 * 2, 8).tolist() == [0.25 * i for i in range(-16, 16)] * 2
    assert dequantize(struct.pack("<2e", 1.5, -2), 1).tolist() == [1.5, -2]


def test_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf())
    found = read_gguf(tmp_path / "a.gguf")
    assert found.metadata == {"name": "naïve", "words": ["a", "b"], "rate": 0.25}
    assert found.tensors["bias"].tolist() == [1, 2, 3]
    assert found.tensors["weight"].shape == (2, 32)  # ggml has the innermost dimension first
    np.testing.assert_array_equal(found.tensors["weight"], [Q4_1_NUMBERS] * 2)


def test_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for size in (3, 10, 60, len(gguf()) - 1):
        path.write_bytes(gguf()[:size])
        with pytest.raises(ModelError, match=f"{path} is (cut short|not a GGUF)"):
            read_gguf(path)
    path.write_bytes(b"GGML" + gguf()[4:])
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_gguf(path)
    with pytest.raises(ModelError, match="ggml type 14"):
        dequantize(b"", 14)
    with pytest.raises(ModelError, match="ends within a block"):
        dequantize(Q4_1[:-1], 3)
