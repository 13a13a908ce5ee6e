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
        ({"rounds": 5}, "at least 6, got 5"),
        ({"seconds": 0}, "above 0, got 0"),
        ({"warm_up_seconds": -1}, "negative, got -1"),
        ({"threads": 0}, "at least 1, got 0"),
        ({"provider": "tpu"}, "one of cpu, cuda, got tpu"),
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"metrics": ("accuracy",)}, "add --eval"),
    ],
)
def test_nonsense_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkConfig(**settings)
