"""Keys, models, operations, unknown routes, names of requests."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import __version__
from tests.api.scripted import Server, serve

ROUTES = [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/scripted"), ("GET", "/v1/unknown")]
ROUTES += [("POST", "/v1/chat/completions"), ("POST", "/tokenize"), ("POST", "/detokenize")]
ROUTES += [("GET", "/tokenizer_info"), ("GET", "/openapi.json")]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer first, Bearer second",
        "Basic first",
        "first",
        "Bearer \xff",
        "Bearer FIRST",
    ],
)
def test_every_v1_route_wants_a_key(header: str | None) -> None:
    headers = {} if header is None else {b"authorization": header.encode("latin-1")}
    with serve(keys=("first", "second", "clé")) as server:
        for method, path in ROUTES:
            response = server.http.request(method, path, headers=headers)
            assert response.status_code == 401, path
            error = response.json()["error"]
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/health/live", "/health/ready", "/version", "/metrics"):
            assert server.http.get(path).status_code == 200
        assert server.engine.requests == []


@pytest.mark.parametrize("header", ["Bearer first", "Bearer second", "bearer first", "Bearer  clé"])
def test_a_valid_key_opens(header: str) -> None:
    with serve(keys=("first", "second", "clé")) as server:
        headers = {b"authorization": header.encode()}
        assert server.http.get("/v1/models", headers=headers).status_code == 200
        assert server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 200
        assert server.http.get("/v1/unknown", headers=headers).status_code == 404


def test_models(server: Server) -> None:
    body = server.http.get("/v1/models").json()
    assert body["object"] == "list"
    assert body["data"] == [
        {
            "id": name,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "gale",
            "root": "scripted",
            "max_model_len": 2000,
            "revision": "v1.2",
            "fingerprint": "fp_scripted",
            "num_parameters": 1_000_000,
            "vocab_size": 300,
            "dtype": "float32",
            "state_dtype": "float32",
            "state_bytes": 1024,
            "max_num_seqs": 8,
            "device": "scripted",
        }
        for name in ("scripted", "org/scripted")
    ]
    assert server.http.get("/v1/models/org/scripted").json() == body["data"][1]
    assert server.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_models_before_the_engine_has_told_of_itself() -> None:
    with serve() as server:
        server.client.info = None
        (card, _) = server.http.get("/v1/models").json()["data"]
        assert card["id"] == "scripted"
        assert card["fingerprint"] is card["num_parameters"] is card["device"] is None


def test_health_and_version(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/states", "GET, POST"),
        ("/v1/states/some/content", "GET"),
        ("/v1/states/prefill", "POST"),
        ("/v1/states/some", "DELETE, GET"),
        ("/v1/completions", "POST"),
        ("/v1/models/some", "GET"),
    ],
)
def test_a_wrong_method_is_told_which_are_right(server: Server, path: str, methods: str) -> None:
    response = server.http.request("PATCH", path)
    assert (response.status_code, response.headers["allow"]) == (405, methods)
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/completions/", "/metrics/", "/docs", "/nope", "/V1/models"])
def test_unknown_routes(server: Server, path: str) -> None:
    response = server.http.get(path)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert path in error["message"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/completions"), ("POST", "/v1/models"), ("PUT", "/metrics")])
def test_wrong_methods(server: Server, method: str, path: str) -> None:
    response = server.http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"]
    assert response.json()["error"]["code"] == "method_not_supported"


def test_metrics() -> None:
    with serve() as server:
        assert server.complete(max_tokens=5).status_code == 200
        response = server.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    values = {(sample.name, *sample.labels.values()): sample.value for f in families.values() for sample in f.samples}
    assert values["gale_engine_ready",] == 1
    assert values["gale_slots_capacity",] == 8
    assert values["gale_requests_running",] == 1
    assert values["gale_prompt_tokens_total",] == 7
    assert values["gale_generated_tokens_total",] == 4
    assert values["gale_requests_finished_total", "cancelled"] == 3
    for name in (
        "gale_time_to_first_token_seconds",
        "gale_time_per_output_token_seconds",
        "gale_request_duration_seconds",
        "gale_queue_time_seconds",
        "gale_step_tokens",
    ):
        assert families[name].type == "histogram"
        assert [values[f"{name}_bucket", bound] for bound in ("0.1", "1.0", "+Inf")] == [1, 3, 6]
        assert values[f"{name}_count",] == 6
        assert values[f"{name}_sum",] == 12.5


def test_metrics_follow_prometheus_conventions(server: Server) -> None:
    """What `promtool check metrics` looks at."""
    server.complete()
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        assert family.name.startswith("gale_")
        assert ":" not in family.name
        assert family.name == family.name.lower()
        assert family.documentation
        assert not family.name.endswith("_total"), "the parser strips it from counters; nothing else may have it"
        assert family.type in ("gauge", "counter", "histogram")
        if family.type == "gauge":
            assert not family.name.endswith(("_count", "_sum", "_bucket"))


@pytest.mark.parametrize("given", ["7f3e", "a.b_c~d:e/f+g=h@i-j", "x" * 128])
def test_the_requests_own_name_is_kept(server: Server, given: str) -> None:
    headers = {"X-Request-Id": given}
    for method, path, status in (
        ("GET", "/health", 200),
        ("GET", "/metrics", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/models", 405),
        ("POST", "/v1/completions", 400),
    ):
        response = server.http.request(method, path, headers=headers)
        assert (response.status_code, response.headers["x-request-id"]) == (status, given)
    response = server.http.post("/v1/completions", json={"prompt": "a", "request_id": "other"}, headers=headers)
    assert response.headers["x-request-id"] == given
    assert response.json()["id"] == f"cmpl-{given}", "the header goes first"


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b'a"b', "é".encode(), b"\xff"])
def test_other_names_are_replaced(server: Server, given: bytes) -> None:
    headers = [server.http.get("/health", headers={b"x-request-id": given}).headers for _ in range(2)]
    first, second = (header["x-request-id"] for header in headers)
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


def test_the_body_may_name_the_request(server: Server) -> None:
    for fields in ({}, {"stream": True}):
        response = server.complete(request_id="my/request-1", **fields)
        assert response.headers["x-request-id"] == "my/request-1"
        assert '"id":"cmpl-my/request-1"' in response.text
    response = server.complete()
    assert response.json()["id"] == "cmpl-" + response.headers["x-request-id"]


def test_refusals_without_a_key_are_named_too() -> None:
    with serve(keys=("k",)) as server:
        response = server.http.get("/v1/models", headers={"X-Request-Id": "7"})
        assert (response.status_code, response.headers["x-request-id"]) == (401, "7")
