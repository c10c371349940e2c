"""The OpenAPI document: complete, and true."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from server.api import schemas
from server.api.sleep import SleepSwitch
from tests.api.scripted import ScriptedEngine, Server, serve

GENERATES = {"200", "400", "401", "403", "404", "413", "415", "429", "500", "503", "507"}
ANSWERS = GENERATES - {"403", "429", "507"}
STATUSES = {
    ("/v1/completions", "post"): GENERATES,
    ("/v1/chat/completions", "post"): GENERATES,
    ("/tokenize", "post"): ANSWERS,
    ("/detokenize", "post"): ANSWERS,
    ("/tokenizer_info", "get"): {"200", "400", "401"},
    ("/v1/states/prefill", "post"): GENERATES | {"201", "408"},
    ("/v1/states", "get"): {"200", "400", "401", "503"},
    ("/v1/states", "post"): {"201", "400", "401", "403", "408", "413", "415", "503", "507"},
    ("/v1/states/{state}/content", "get"): {"200", "400", "401", "404", "503", "507"},
    ("/v1/states/{state}", "get"): {"200", "400", "401", "404", "503"},
    ("/v1/states/{state}", "delete"): {"200", "400", "401", "404", "503", "507"},
    ("/v1/states/{state}/fork", "post"): {"201", "400", "401", "403", "404", "413", "415", "503", "507"},
    ("/v1/models", "get"): {"200", "401"},
    ("/v1/models/{model}", "get"): {"200", "401", "404"},
    ("/health", "get"): {"200", "503"},
    ("/health/live", "get"): {"200"},
    ("/health/ready", "get"): {"200", "503"},
    ("/sleep", "post"): {"200", "400", "401", "503"},
    ("/wake_up", "post"): {"200", "400", "401", "503"},
    ("/is_sleeping", "get"): {"200", "400", "401"},
    ("/version", "get"): {"200"},
    ("/metrics", "get"): {"200"},
}
SWITCH = SleepSwitch(lambda wait: None, lambda: None)
MODELS = {
    name: model
    for info in pkgutil.iter_modules(schemas.__path__, f"{schemas.__name__}.")
    for name, model in vars(importlib.import_module(info.name)).items()
    if isinstance(model, type) and issubclass(model, BaseModel)
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    with serve(sleep_switch=SWITCH) as server:
        return server.http.get("/openapi.json").json()


def components(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return document["components"]["schemas"]


def fields(name: str) -> dict[str, FieldInfo]:
    """A model's fields, as they are called in JSON."""
    return {info.alias or field: info for field, info in MODELS[name].model_fields.items()}


def operations(document: dict[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield (path, method), operation


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references == components(document).keys(), "nothing dangles, nothing is left over"
    assert references <= MODELS.keys()


def test_every_route_is_described_with_its_errors(document: dict[str, Any]) -> None:
    assert {at: operation["responses"].keys() for at, operation in operations(document)} == STATUSES
    for at, operation in operations(document):
        assert operation["summary"], at
        assert operation["description"], at
        for status, response in operation["responses"].items():
            assert response["description"] not in ("", "Successful Response"), (at, status)
            assert response["content"], (at, status)
            if int(status) >= 400:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
            headers = {"X-Request-Id"} | ({"Retry-After"} if status in ("429", "503") else set())
            assert response["headers"].keys() == headers, (at, status)
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], at
        if at[1] == "post" and at[0] not in ("/sleep", "/wake_up"):
            assert operation["requestBody"]["required"] is not at[0].endswith("/fork")


def test_every_field_is_described(document: dict[str, Any]) -> None:
    for name, schema in components(document).items():
        assert schema["description"], name
        for field, properties in schema["properties"].items():
            # What is a reference and nothing else is described where it leads.
            assert properties.get("description") or set(properties) == {"$ref"}, f"{name}.{field}"


def test_every_field_has_an_example(document: dict[str, Any]) -> None:
    for name, schema in components(document).items():
        for field, properties in schema["properties"].items():
            # What leads to other models has the examples there; what may have a few values only lists them.
            shows = {"examples", "enum", "const"} & properties.keys() or '"$ref"' in json.dumps(properties)
            assert shows, f"{name}.{field}"


def test_the_document_shows_every_field_of_the_models(document: dict[str, Any]) -> None:
    for name, schema in components(document).items():
        assert schema["properties"].keys() == fields(name).keys(), name
        is_request = MODELS[name].model_config.get("extra") == "forbid"
        assert schema.get("additionalProperties", True) is not is_request, name


def test_examples_are_valid(document: dict[str, Any]) -> None:
    count = 0
    for name, schema in components(document).items():
        for field, properties in schema["properties"].items():
            info = fields(name)[field]
            kind = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            for example in properties.get("examples", ()):
                TypeAdapter(kind).validate_python(example)
                count += 1
    assert count > 30


READS_ALL = "{{ messages[0].content }}{{ enable_thinking }}{{ documents }}"


def test_requests_made_of_examples_are_answered(document: dict[str, Any]) -> None:
    """All required fields, and each optional one that has an example, alone."""
    engine = ScriptedEngine(stop_after=5)
    with serve(engine, served_model_names=("classics-11m",), chat_template=READS_ALL) as server:
        assert server.complete("a", save_state="my-book").status_code == 200
        for (path, _), operation in operations(document):
            if "requestBody" not in operation:
                continue
            if "application/json" not in operation["requestBody"]["content"]:
                continue
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            for reference in schema.get("anyOf", [schema]):
                answers(
                    server, path.format(state="my-book"), components(document)[reference["$ref"].rpartition("/")[2]]
                )


def answers(server: Server, path: str, schema: dict[str, Any]) -> None:
    needed = {name: schema["properties"][name]["examples"][0] for name in schema.get("required", ())}
    if "tokens" in needed:
        needed["tokens"] = [token % 256 for token in needed["tokens"]]  # of the shipped model's vocabulary
    for field, properties in schema["properties"].items():
        for example in properties.get("examples", ()):
            body = needed | {field: example} if field not in needed else needed
            body |= {"logprobs": True} if field == "top_logprobs" else {}
            body |= {"save_state": True} if field == "state_ttl" else {}
            response = server.http.post(path, json=body)
            assert response.status_code in (200, 201), (path, body, response.text)


def test_keys_are_in_the_document() -> None:
    with serve(keys=("k",), sleep_switch=SWITCH) as server:
        document = server.http.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    secured = {at[0] for at, operation in operations(document) if operation.get("security") == [{"key": []}]}
    assert {path for path, _ in STATUSES} - secured == {
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/metrics",
    }
