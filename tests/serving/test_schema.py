"""Requests nobody would write by hand, against the schema that the server itself publishes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from dovetail.serving.gate import RequestLimits
from tests.serving.live import Live, live, tiny_served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live([tiny_served("tiny")], limits=RequestLimits(max_new_tokens=16)) as running:
        yield running


CASES = {
    "/v1/models": [GenerationMode.POSITIVE],
    "/v1/models/{name}": [GenerationMode.POSITIVE],
    "/v1/chat/completions": [GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
    "/v1/completions": [GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
    "/health": [GenerationMode.POSITIVE],
    "/ready": [GenerationMode.POSITIVE],
    "/metrics": [GenerationMode.POSITIVE],
}
"""Where a request has a body there are invalid ones too."""


@pytest.mark.parametrize(("path", "mode"), [(path, mode) for path, modes in CASES.items() for mode in modes])
def test_no_request_breaks_the_server_or_its_schema(server: Live, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = next(iter(schema[path].values()))

    @settings(
        max_examples=100,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def breaks_nothing(case: schemathesis.Case) -> None:
        assume(mode != GenerationMode.POSITIVE or has_valid_seed(case.body))
        case.call_and_validate()
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # With a model that is there, in the place of a valid name: a wrong one stays wrong. What a model cannot do
            # is no part of the schema: a 400 is right then.
            case.body["model"] = "tiny"
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

    breaks_nothing()


def has_valid_seed(body: object) -> bool:
    """Return whether the seed is within its bounds; the generator compares 2**63 as a float and exceeds it."""
    seed = body.get("seed") if isinstance(body, dict) else None
    return seed is None or -(2**63) <= seed < 2**63


def test_every_route_of_the_api_is_tried(server: Live) -> None:
    paths = set(schemathesis.openapi.from_url(f"{server.url}/openapi.json").raw_schema["paths"])
    assert paths == set(CASES)
