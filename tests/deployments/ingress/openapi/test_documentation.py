"""The public pages: served without a key, and complete without any other server."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

from jsonschema import Draft202012Validator

from tests.deployments.ingress.memory_gateway import gateway
from tests.deployments.ingress.virtual_time import in_virtual_time


class References(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data") and value]


@in_virtual_time
async def test_documents_need_no_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        del gate.client.headers["authorization"]
        for path in ("/openapi.json", "/openai/schemas/Completion.json"):
            response = await gate.client.get(path)
            assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        schema = response.json()
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["properties"]["$schema"]["format"] == "uri"
        Draft202012Validator.check_schema(schema)


async def test_the_page_asks_no_other_server_for_anything(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        del gate.client.headers["authorization"]
        page = await gate.client.get("/docs")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert not re.search("https?://|//[a-z]", page.text)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert not re.search(r"https?:|\*", policy)
        urls = [url for url in References(page.text).urls if url != "data:,"]
        assert len(urls) == 3
        for url in urls:
            response = await gate.client.get(urljoin("/docs", url))
            assert response.status_code == 200
            assert response.headers["content-type"].startswith(("text/css", "text/javascript"))
            if url.endswith(".css"):
                assert not re.search(r"url\(\s*[\"']?(?!data:|[\"']?data:)", response.text)
                assert "@import" not in response.text
            if url.endswith("start.js"):
                assert "validatorUrl: null" in response.text
                [document] = re.findall('url: "(.*)"', response.text)
                assert json.loads((await gate.client.get(urljoin("/docs", document))).text)["openapi"]
