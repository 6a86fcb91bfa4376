"""What /openapi.json promises holds, for whatever fits its schemas and for whatever does not."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.ingress.openapi.document import openapi_document
from tests.conftest import THOROUGH, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

EXAMPLES = {"POST /v1/completions": 500 if THOROUGH else 200, "POST /openai/v1/completions": 250 if THOROUGH else 100}
"""Of each operation; 2,000 over all in a thorough run. The others share the rest."""
OTHERS = 60 if THOROUGH else 40

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
]
"""And response_schema_conformance, but for streams, whose schema is of an event's data."""
CHUNK = Draft202012Validator({**openapi_document(), "$ref": "#/components/schemas/CompletionChunk"})
OPERATIONS = [f"{method.upper()} {path}" for path, methods in openapi_document()["paths"].items() for method in methods]


@pytest.fixture(scope="module")
def operations() -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(
        deepcopy(openapi_document()),  # its cases share what they are made of
        config=SchemathesisConfig.from_dict({"max-stream-events": 1_000_000}),  # else it hangs up after 20
    )
    found = [each.ok() for each in schema.get_all_operations() if isinstance(each, Ok)]
    return {operation.label: operation for operation in found}


def test_enough_examples_are_drawn(operations: dict[str, Any]) -> None:
    assert operations.keys() == set(OPERATIONS)
    assert sum(EXAMPLES.get(label, OTHERS) for label in OPERATIONS) >= (2000 if THOROUGH else 1000)
    assert EXAMPLES.keys() <= operations.keys()


def test_the_document_is_valid_and_the_one_that_is_served(simulated_cluster: RunningCluster) -> None:
    served = httpx.get(f"{simulated_cluster.url}/openapi.json", trust_env=False).json()
    validate(served, cls=OpenAPIV31SpecValidator)
    assert served["openapi"].startswith("3.1")
    assert served == openapi_document()


def assert_documented_stream(text: str) -> None:
    """Every event is a chunk as the document describes it, or the error with which the stream ends."""
    *events, end = text.removesuffix("\n\n").split("\n\n")
    for event in events:
        CHUNK.validate(json.loads(event.removeprefix("data: ")))
    assert end == "data: [DONE]" or set(json.loads(end.removeprefix("data: "))) == {"error"}


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_documented(simulated_cluster: RunningCluster, operations: dict[str, Any], label: str) -> None:
    operation = operations[label]
    cases = st.one_of(operation.as_strategy(GenerationMode.POSITIVE), operation.as_strategy(GenerationMode.NEGATIVE))

    with requests.Session() as session:
        session.trust_env = False

        @settings(
            max_examples=EXAMPLES.get(label, OTHERS),
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=cases, model=st.sampled_from(["sim-a", "sim-b", None]), short=st.booleans())
        def answered(case: Any, model: str | None, short: bool) -> None:
            if isinstance(case.body, dict):
                body = dict(case.body)  # it may be an example of the document itself
                if model is not None:  # else nearly all would be unknown
                    body["model"] = model
                if short:  # a context full of tokens takes seconds
                    body.pop("max_tokens", None)
                case.body = body
            assume(
                len(urlencode(case.query or {}, doseq=True)) < 8000
            )  # HAProxy refuses longer ones in words of its own
            response = case.call(
                base_url=simulated_cluster.url, session=session, headers=simulated_cluster.headers, timeout=60
            )
            if response.headers["content-type"][0].startswith("text/event-stream"):
                case.validate_response(response, checks=CHECKS)
                assert_documented_stream(response.text)
            else:
                case.validate_response(response, checks=[*CHECKS, response_schema_conformance])

        answered()
