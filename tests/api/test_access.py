"""Keys, limits per key, and pages of other origins."""

from typing import Any

import httpx
import openai
import pytest

from tests.api.scripted import ScriptedEngine, Server, serve
from tests.waiting import wait_until

PUBLIC = ("/health", "/version", "/metrics")


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def test_a_request_travels_under_the_name_of_its_key() -> None:
    with serve(keys=("first", "second")) as server:
        for name in ("second", "first", "second"):
            body = {"prompt": "a", "max_tokens": 1}
            assert server.http.post("/v1/completions", json=body, headers=key(name)).status_code == 200
        assert [request.tenant for request in server.engine.requests] == ["key-2", "key-1", "key-2"]
    with serve() as server:
        assert server.complete(max_tokens=1).status_code == 200
        assert server.engine.requests[0].tenant == ""


def test_protected_routes_want_a_key_too() -> None:
    with serve(keys=("k",), protect_all_routes=True) as server:
        for path in (*PUBLIC, "/openapi.json"):
            assert server.http.get(path).status_code == 401
            assert server.http.get(path, headers=key("k")).status_code == 200
        paths = server.http.get("/openapi.json", headers=key("k")).json()["paths"]
        for operations in paths.values():
            for operation in operations.values():
                assert operation["security"] == [{"key": []}]
                assert "401" in operation["responses"]


@pytest.mark.parametrize("streamed", [False, True])
def test_over_the_limit_of_a_key_is_429_with_retry_after(streamed: bool) -> None:
    with serve(ScriptedEngine(paused=True, max_per_tenant=3), keys=("first", "second")) as server:
        body = {"prompt": "a", "n": 2, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body, headers=key("first")) as running:
            assert running.status_code == 200
            refused = server.http.post("/v1/completions", json={**body, "stream": streamed}, headers=key("first"))
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["content-type"] == "application/json"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            with (
                openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="first", max_retries=0) as client,
                pytest.raises(openai.RateLimitError) as caught,
            ):
                client.completions.create(model="scripted", prompt="a", n=2)
            assert caught.value.code == "rate_limit_exceeded"
            server.engine.paused = False
            assert server.http.post("/v1/completions", json=body, headers=key("second")).status_code == 200
        wait_until(lambda: not server.engine.running)
        assert server.http.post("/v1/completions", json=body, headers=key("first")).status_code == 200


ORIGIN = "https://chat.example.com"


def preflight(server: Server, origin: str, *, path: str = "/v1/completions", method: str = "POST") -> httpx.Response:
    """What a browser asks before a page of another origin may send JSON with a key."""
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return server.http.options(path, headers=headers)


def allowed_for(response: httpx.Response) -> str | None:
    return response.headers.get("access-control-allow-origin")


@pytest.mark.parametrize("origins", [(ORIGIN, "http://localhost:3000"), ("*",)])
def test_pages_of_allowed_origins_may_use_the_api(origins: tuple[str, ...]) -> None:
    expected = "*" if origins == ("*",) else ORIGIN
    with serve(keys=("k",), allowed_origins=origins) as server:
        asked = preflight(server, ORIGIN)
        assert asked.status_code == 200
        assert allowed_for(asked) == expected
        assert "POST" in asked.headers["access-control-allow-methods"]
        allowed = asked.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type", "x-stainless-lang"} <= {name.strip() for name in allowed.split(",")}
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
        page = {"origin": ORIGIN}
        for fields, headers, status in (
            (body, key("k"), 200),
            ({**body, "stream": True}, key("k"), 200),
            ({**body, "n": 0}, key("k"), 400),
            (body, key("wrong"), 401),
        ):
            response = server.http.post("/v1/completions", json=fields, headers={**page, **headers})
            assert (response.status_code, allowed_for(response)) == (status, expected)
            assert "Retry-After" in response.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in response.headers


def test_pages_of_other_origins_may_not() -> None:
    with serve(allowed_origins=(ORIGIN,)) as server:
        for origin in ("https://evil.example", "http://chat.example.com", f"{ORIGIN}.evil.example", "null"):
            assert preflight(server, origin).status_code == 400
            response = server.http.get("/v1/models", headers={"origin": origin})
            assert (response.status_code, allowed_for(response)) == (200, None)


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_by_default_no_other_origin_is_allowed(keys: tuple[str, ...]) -> None:
    with serve(keys=keys) as server:
        asked = preflight(server, ORIGIN)
        assert (asked.status_code, allowed_for(asked)) == (401 if keys else 405, None)
        response = server.http.get("/v1/models", headers={"origin": ORIGIN, **key("k")})
        assert (response.status_code, allowed_for(response)) == (200, None)
