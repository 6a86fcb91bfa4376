"""One more endpoint is one folder and one line: what it says of itself is enough for all the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import httpx
from fastapi import APIRouter
from openapi_spec_validator import OpenAPIV31SpecValidator

from deployments.ingress.api.description.answers import Answer
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import (
    ANY_WITH_KEY,
    READING_A_BODY,
    answered,
    json_content,
    operation,
    posted,
)
from deployments.ingress.api.description.tables import parameter_table
from deployments.ingress.api.endpoints import ENDPOINTS
from deployments.ingress.api.services import Caller, RequestBody
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.http.json_body import Body, parsed_body
from deployments.ingress.openapi.document import openapi_document
from deployments.ingress.openapi.markdown import api_reference
from tests.deployments.ingress.memory_gateway import AUTHORIZED, BODY_LIMIT_BYTES, gateway, meter_client_of
from tests.deployments.ingress.memory_meter import ADMIN_KEY
from tests.deployments.ingress.virtual_time import in_virtual_time

# --- the folder -----------------------------------------------------------------------------------------------------


class EchoRequest(Body):
    text: str
    """What to say."""


class Echo(Answer):
    text: str
    key_id: str


router = APIRouter()


@router.post(
    "/v1/echo",
    openapi_extra=operation(
        "Say it again",
        "echo",
        answered("The same.", json_content("Echo")),
        *(400, *ANY_WITH_KEY, *READING_A_BODY),
        requestBody=posted("EchoRequest", {"text": "hello"}),
    ),
)
async def echo(key: Caller, body: RequestBody) -> Echo:
    return Echo(text=(await parsed_body(body, EchoRequest)).text, key_id=key.key_id)


def reference() -> str:
    return f"## Echo\n\n`POST /v1/echo`:\n\n{parameter_table(EchoRequest, source=False)}"


ECHO: Final = Endpoint("echo", "What was said.", router, (EchoRequest, Echo), reference)

# --- the line -------------------------------------------------------------------------------------------------------

WITH_ECHO: Final = (*ENDPOINTS, ECHO)


@in_virtual_time
async def test_it_is_served_with_keys_bodies_errors_and_metrics(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        meter = meter_client_of(gate.meter, gate.folder, "with-echo")
        app = build_app(gate.catalog, meter, IngressSettings(BODY_LIMIT_BYTES, 15.0), endpoints=WITH_ECHO)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            stranger = await client.post("/v1/echo", json={"text": "a"})
            assert (stranger.status_code, stranger.json()["error"]["code"]) == (401, "invalid_api_key")
            said = await client.post("/v1/echo", json={"text": "a"}, headers=AUTHORIZED)
            assert (said.status_code, said.json()["text"]) == (200, "a")
            wrong = await client.post("/v1/echo", json={"text": "a", "loud": True}, headers=AUTHORIZED)
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "loud")
            unread = await client.post("/v1/echo", content=b"a", headers=AUTHORIZED)
            assert unread.status_code == 415
            other = await client.get("/v1/echo")
            assert (other.status_code, other.headers["allow"]) == (405, "POST")
            metrics = (await client.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"})).text
            for status in (200, 400, 401, 405, 415):
                labels = f'{{ingress="with-echo",path="/v1/echo",status="{status}"}}'
                assert f"millstream_http_responses_total{labels} 1.0" in metrics
            document = (await client.get("/openapi.json")).json()
        await meter.close()
    assert document["paths"]["/v1/echo"]["post"]["summary"] == "Say it again"
    assert document["components"]["schemas"]["EchoRequest"]["required"] == ["text"]


def test_the_documents_have_it() -> None:
    OpenAPIV31SpecValidator(openapi_document(WITH_ECHO)).validate()
    assert "/v1/echo" not in openapi_document()["paths"]
    text = api_reference(WITH_ECHO)
    assert "| `POST /v1/echo` | Say it again | yes |" in text
    assert "| `text` | string | required | What to say. |" in text
