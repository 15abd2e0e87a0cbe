"""The description of the API: valid OpenAPI, complete, and a page without anything from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import openapi_spec_validator

from octavo_engine.api.openapi import ROUTES


async def get(http: Any, url: str) -> Any:
    async with http.get(url) as response:
        assert response.status == 200
        return await (response.json() if response.content_type == "application/json" else response.text())


async def test_the_document_is_valid_and_names_fields(server, http) -> None:
    document = await get(http, server.url + "/openapi.json")

    openapi_spec_validator.validate(document)
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "tools", "stream"} <= chat.keys()


async def test_each_route_that_is_described_exists(server, http) -> None:
    for route in ROUTES:
        url = server.url + route.path.replace("{model}", "tiny")
        async with http.request(route.method, url, json={} if route.method == "POST" else None) as response:
            assert response.status in (200, 400), route


async def test_the_page_shows_every_route_and_loads_nothing(server, http) -> None:
    page = await get(http, server.url + "/docs")

    assert all(route.path in page for route in ROUTES)
    assert "top_logprobs" in page
    assert not re.search(r"<script|<link|<img|https?://|@import", page)
