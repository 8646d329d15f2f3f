"""The description of the endpoint, held against a real server by schemathesis.

Bytes that follow the description are seldom an image: that they are refused is no fault (`positive_data_acceptance`).
"""

import json
import urllib.request

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance


def check(address: str, examples: int) -> int:
    """Requests that follow the description, and some that do not; returns how many were sent."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    sent = 0
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(
            max_examples=examples,
            deadline=None,  # the machine may be busy
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=strategy)
        def answers_as_described(case):
            nonlocal sent
            sent += 1
            case.call_and_validate(base_url=address, excluded_checks=[positive_data_acceptance], timeout=60)

        answers_as_described()
    return sent


def test_every_answer_is_one_that_the_description_names(real_server):
    assert check(real_server.address, 15) >= 15


@pytest.mark.slow
def test_every_answer_to_many_requests_is_one_that_the_description_names(real_server):
    assert check(real_server.address, 500) >= 500


def test_an_answer_that_is_not_described_would_be_noticed(real_server):
    with urllib.request.urlopen(f"{real_server.address}/openapi.json", timeout=60) as answer:
        described = json.load(answer)
    del described["paths"]["/api/detect"]["post"]["responses"]["400"]
    case = schemathesis.openapi.from_dict(described)["/api/detect"]["POST"].Case(
        body=b"no image", media_type="image/png"
    )
    with pytest.raises(FailureGroup, match="400"):
        case.call_and_validate(base_url=real_server.address, excluded_checks=[positive_data_acceptance])
