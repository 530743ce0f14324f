"""The comparison of engines: what a step must at least take, and what a measuring process tells of its weights."""

from __future__ import annotations

import pytest

from benchmarks.engines import least_time
from benchmarks.engines.__main__ import rows_of_weights
from benchmarks.engines.measurement import CONTEXT_LEN, PREFIX, Measurement, told
from benchmarks.roofline import Roofline
from disaggregated.model_files import ModelConfig, resolve

SLOW_MEMORY = Roofline(bytes_per_s=1e9, operations_per_s={"float32": 1e18, "int8": 1e18})
NARROW = {"4 bits, scales and minima": 67_000_000, "8 bits and scales": 30_000_000}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.load(resolve("smollm2-135m-instruct", weights=False).path)


def test_a_step_takes_at_least_the_reading_of_weights_as_they_are_held(model: ModelConfig) -> None:
    kv_bytes = 4 * 2 * 30 * 3 * 64 * CONTEXT_LEN
    for weight_bytes in (538_000_000, sum(NARROW.values())):
        least_s = least_time.decode_s(SLOW_MEMORY, model, 8, "float32", weight_bytes=weight_bytes)
        assert least_s == pytest.approx((weight_bytes + 8 * kv_bytes) / 1e9)


def test_a_measurement_brings_the_forms_of_its_weights_along() -> None:
    measured = Measurement("ours float32", 1, weight_bytes=NARROW)
    line = f"noise\n{PREFIX}" + '{"system": "a peer", "threads": 1, "prefill": {}, "decode": {}}\n'
    theirs = told(line)
    assert theirs is not None
    assert theirs.weight_bytes == {}
    (row,) = rows_of_weights("ours float32", measured)
    assert row.seen == "67 MB in 4 bits, scales and minima; 30 MB in 8 bits and scales"
    assert list(rows_of_weights("a peer", theirs)) == []
