from __future__ import annotations

import pytest

from disaggregated.errors import InvalidRequest
from orchestrator.admission.ticket import Objectives


def test_objectives_are_read_from_headers_in_their_units() -> None:
    headers = {"x-request-timeout": "2.5", "x-slo-ttft-ms": "200", "x-slo-tpot-ms": "30"}
    assert Objectives.read(headers) == Objectives(timeout_s=2.5, ttft_s=0.2, tpot_s=0.03)
    assert Objectives.read({}) == Objectives()


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e9", "1,5", "0x10"])
@pytest.mark.parametrize("name", ["x-request-timeout", "x-slo-ttft-ms", "x-slo-tpot-ms"])
def test_a_header_that_is_no_sensible_time_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be a number of") as caught:
        Objectives.read({name: value})
    assert caught.value.param == name
