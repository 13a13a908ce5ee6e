import json
from typing import Any

import pytest

from calib_data.errors import ConfigError
from compress.config import StageConfig
from compress.distill import DistillConfig
from compress.prune import PruneConfig
from compress.quantize import QuantizeConfig
from compress.training import TrainConfig
from export.graph import ExportConfig

CHANGED: list[StageConfig] = [
    PruneConfig(heads=0.5, ffn=0.125, round_to=4, seed=3),
    QuantizeConfig(skip=("pooler.*", "lm_head")),
    QuantizeConfig("weight-only", bits=8, block_size=64),
    TrainConfig(steps=7, learning_rate=1e-3, schedule="linear", precision="bf16"),
    TrainConfig(epochs=1.5, ema=0.999, gradient_checkpointing=True, patience=3),
    DistillConfig(losses=("hidden", "logits=0.5"), temperature=2.0, train=TrainConfig(steps=9)),
    DistillConfig(alpha=0.5, beta=0.1, layer_map="0:1,-1:-1", relation_map="0:3", relation_heads=8),
    ExportConfig(target="portable", opset=20),
]
CLASSES = [type(config) for config in CHANGED]


@pytest.mark.parametrize("config", [*CHANGED, *(kind() for kind in CLASSES)], ids=repr)
def test_round_trips_through_json(config: StageConfig) -> None:
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("kind", CLASSES)
def test_unknown_key_is_named(kind: type[StageConfig]) -> None:
    with pytest.raises(ConfigError, match="'tempratur'") as caught:
        kind.from_json({"tempratur": 1})
    assert caught.value.exit_code == 2


def test_unknown_nested_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'stepz'"):
        DistillConfig.from_json({"train": {"stepz": 1}})


BAD: list[tuple[type[StageConfig], dict[str, Any]]] = [
    (PruneConfig, {"heads": 1.0}),
    (PruneConfig, {"heads": -0.1}),
    (PruneConfig, {"ffn": float("nan")}),
    (PruneConfig, {"round_to": 0}),
    (QuantizeConfig, {"scheme": "magic"}),
    (QuantizeConfig, {"scheme": "weight-only", "bits": 5}),
    (QuantizeConfig, {"scheme": "weight-only", "block_size": "many"}),
    (QuantizeConfig, {"bits": 4}),
    (TrainConfig, {"steps": 0}),
    (TrainConfig, {"learning_rate": 0.0}),
    (TrainConfig, {"warmup": 1.5}),
    (TrainConfig, {"clip": 0.0}),
    (TrainConfig, {"accumulate": 0}),
    (TrainConfig, {"schedule": "step"}),
    (TrainConfig, {"precision": "int4"}),
    (TrainConfig, {"ema": 1.0}),
    (TrainConfig, {"epochs": 0.0}),
    (TrainConfig, {"eval_every": 0}),
    (TrainConfig, {"patience": -1}),
    (TrainConfig, {"weight_decay": -0.1}),
    (DistillConfig, {"temperature": 0.0}),
    (DistillConfig, {"alpha": 1.1}),
    (DistillConfig, {"losses": ["logitz"]}),
    (DistillConfig, {"losses": ["logits=much"]}),
    (DistillConfig, {"losses": ["logits=-1"]}),
    (DistillConfig, {"losses": ["logits=nan"]}),
    (DistillConfig, {"losses": ["logits", "logits=2"]}),
    (DistillConfig, {"beta": 0.0}),
    (DistillConfig, {"beta": 1.0}),
    (DistillConfig, {"layer_map": "first"}),
    (DistillConfig, {"relation_map": "-1:0"}),
    (DistillConfig, {"relation_heads": -1}),
    (DistillConfig, {"contrast_temperature": 0.0}),
    (DistillConfig, {"train": {"steps": 0}}),
    (ExportConfig, {"target": "tpu"}),
    (ExportConfig, {"opset": 17}),
    (ExportConfig, {"opset": 25}),
    # of the wrong type, as a recipe may hold them
    (PruneConfig, {"heads": "a quarter"}),
    (TrainConfig, {"steps": "many"}),
    (DistillConfig, {"losses": "embedding"}),
]


@pytest.mark.parametrize(("kind", "values"), BAD, ids=str)
def test_nonsense_is_refused(kind: type[StageConfig], values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.from_json(values)
    assert "\n" not in str(caught.value)
