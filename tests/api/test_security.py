"""What nobody may get without a key, and names that are no paths."""

from collections.abc import Iterable, Iterator
from urllib.parse import unquote

import pytest
from starlette.routing import BaseRoute, Route

from server.api.app import create_app
from server.api.sleep import SleepSwitch
from tests.api.scripted import ByteTokenizer, Server, api_settings, serve

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
OPEN = {
    *("/", "/playground.css", "/playground.js", "/states.js"),
    *("/health", "/health/live", "/health/ready", "/metrics", "/version"),
}
"""Written out here: whoever opens another path has to say so twice."""
SWITCH = SleepSwitch(lambda wait: None, lambda: None)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    with serve(keys=("sesame",), chat_template=TEMPLATE, sleep_switch=SWITCH) as running:
        yield running


def paths_of(routes: Iterable[BaseRoute]) -> Iterator[str]:
    """The path of every route, with something in place of its parameters."""
    for route in routes:
        # FastAPI keeps the routes of a router together.
        if (router := getattr(route, "original_router", None)) is not None:
            yield from paths_of(router.routes)
        else:
            assert isinstance(route, Route), "a mounted application has routes of its own"
            yield route.path_format.replace("{model}", "scripted").replace("{state}", "mine")


def test_every_route_but_a_few_wants_a_key(locked: Server) -> None:
    app = create_app(api_settings(keys=("sesame",)), locked.client, ByteTokenizer(), None, SWITCH)  # type: ignore[arg-type]
    paths = set(paths_of(app.routes))
    assert paths > OPEN | {"/v1/completions", "/v1/models/scripted", "/sleep"} and not any(
        "{" in path for path in paths
    )
    for path in paths:
        statuses = {method: locked.http.request(method, path).status_code for method in METHODS}
        if path in OPEN:
            assert statuses["GET"] == 200, path
            assert statuses["POST"] == statuses["DELETE"] == 405, path
        else:
            assert set(statuses.values()) == {401}, (path, statuses)
    assert locked.engine.requests == []


@pytest.mark.parametrize(
    "path",
    [
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health%2f..%2fv1/models",
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/v1/models;/health",
        "/v1/models%00/health",
        "/v1/models?/health",
        "/playground.js/../v1/models",
        "/playground.js%2f..%2fv1%2fmodels",
        "/./openapi.json",
    ],
)
def test_no_spelling_of_a_path_goes_round_the_key(locked: Server, path: str) -> None:
    status = raw_get(locked, path)
    assert status in (400, 401), status


TRAVERSALS = [
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "../../../etc/passwd",
    "%2Fetc%2Fpasswd",
    "scripted%2f..%2f..",
    "..%5c..%5cwindows",
    "scripted%00",
    "%ff%fe",
    "scripted/../scripted",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_a_models_name_is_a_name_and_no_path(server: Server, name: str) -> None:
    assert raw_get(server, f"/v1/models/{name}") == 404
    fields = {"prompt": "a", "model": unquote(name)}
    answer = server.http.post("/v1/completions", json=fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "path", ["/static/index.html", "/playground.js/..%2f..%2fapp.py", "/..%2fapp.py", "/index.html"]
)
def test_no_file_is_served_but_the_playgrounds(server: Server, path: str) -> None:
    assert raw_get(server, path) == 404


def raw_get(server: Server, path: str) -> int:
    """The status of a path as it stands: clients would tidy it up."""
    with server.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return int(connection.recv(1 << 16).split()[1])
