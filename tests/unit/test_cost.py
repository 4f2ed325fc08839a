import math

import pytest

from gradq.errors import ConfigError
from gradq.policy.cost import expected_step_ms


def test_the_parts_add_up():
    assert expected_step_ms(100, 0, 25_000_000, 1) == 300  # 25 MB at 1 Gbit/s: 200 ms
    assert expected_step_ms(100, 7, 25_000_000, 10) == pytest.approx(127)
    assert expected_step_ms(100, 7, 0, 0.1) == 107


def test_an_infinite_link_leaves_the_computation():
    assert expected_step_ms(12.5, 1.5, 10**9, math.inf) == 14


def test_compression_pays_on_a_slow_link_only():
    def dense(gbps):
        return expected_step_ms(100, 0, 25_000_000, gbps)

    def int4(gbps):
        return expected_step_ms(100, 12, 3_200_000, gbps)

    assert int4(1) < dense(1) / 2
    assert int4(100) > dense(100)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gbps": 0}, "gbps=0"),
        ({"gbps": -1}, "gbps=-1"),
        ({"gbps": math.nan}, "gbps=nan"),
        ({"compute_ms": -1}, "compute_ms=-1"),
        ({"codec_ms": math.nan}, "codec_ms=nan"),
        ({"wire_bytes": math.inf}, "wire_bytes=inf"),
    ],
)
def test_impossible_values_are_named(changed, named):
    arguments = {"compute_ms": 1, "codec_ms": 1, "wire_bytes": 1, "gbps": 1} | changed
    with pytest.raises(ConfigError, match=named):
        expected_step_ms(**arguments)
