import json
from typing import Any

import pytest

from benchmarks.config import BenchmarkConfig
from calib_data.errors import ConfigError


def test_settings_round_trip_through_json() -> None:
    config = BenchmarkConfig(shapes=((1, 8), (4, 16)), eval="dev.csv", metrics=("spearman",))
    assert BenchmarkConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shapes": ()}, "at least one shape"),
        ({"shapes": ((0, 8),)}, "at least 1, got"),
        ({"shapes": ((8,),)}, "batch × sequence"),
        ({"shapes": ((8, 8), (8, 8))}, "twice"),
        ({"rounds": 7}, "at least 8, got 7"),
        ({"prompts": (0,)}, "at least 1 token"),
        ({"new_tokens": 1}, "at least 2, got 1"),
        ({"precision": 0}, "precision must be above 0"),
        ({"max_time": 0}, "max time must be above 0"),
        ({"seconds": 0}, "above 0, got 0"),
        ({"warm_up_seconds": -1}, "negative, got -1"),
        ({"threads": (0,)}, "threads must be at least 1, got"),
        ({"streams": (1,)}, "need each other"),
        ({"cuda_graphs": True}, "need --provider cuda"),
        ({"cuda_graphs": True, "provider": "cuda", "transfers": True}, "leave --transfers out"),
        ({"cuda_graphs": True, "provider": "cuda", "traffic": "x"}, "fixed shapes"),
        ({"target": 5.0}, "need each other"),
        ({"streams": (1,), "target": 0.0}, "above 0 milliseconds"),
        ({"provider": "tpu"}, "one of cpu, cuda, tensorrt, got tpu"),
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"metrics": ("accuracy",)}, "add --eval"),
    ],
)
def test_nonsense_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkConfig(**settings)
