from typing import Any

import pytest
import torch

from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.saturation import saturates
from tests.tiny import tiny_checkpoint

PROCESSORS: dict[str, tuple[dict[str, Any], bool]] = {
    "AVX2": ({"architecture": "x86_64", "avx2": True, "avx512_vnni": False}, True),
    "AVX-512 without VNNI": ({"architecture": "x86_64", "avx512_f": True}, True),
    "AVX-512 VNNI": ({"architecture": "x86_64", "avx512_f": True, "avx512_vnni": True}, False),
    "AVX VNNI": ({"architecture": "x86_64", "avx_vnni": True}, False),
    "AMX": ({"architecture": "x86_64", "amx_int8": True}, False),
    "ARM": ({"architecture": "aarch64", "dot": False}, False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities, expected = PROCESSORS[name]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert saturates() == expected
    for scheme in ("dynamic", "static"):
        assert QuantizeConfig(scheme).reduce_range == expected
        assert QuantizeConfig(scheme, reduce_range=not expected).reduce_range == (not expected)
        made = QuantizeConfig(scheme, reduce_range=not expected)
        assert QuantizeConfig.from_json(made.to_json()) == made
    assert QuantizeConfig("weight-only").reduce_range is None


def test_this_processor_is_known() -> None:
    capabilities = torch.cpu.get_capabilities()
    known = {"x86_64", "i386", "i686", "x86"} | {"aarch64", "arm64", "arm"}
    assert capabilities["architecture"] in known
    assert isinstance(saturates(), bool)


def test_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint("bert")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: PROCESSORS["AVX2"][0])
    assert "weights got 7 bits" in quantize(checkpoint, QuantizeConfig()).report["note"]
    assert "note" not in quantize(checkpoint, QuantizeConfig(reduce_range=False)).report
