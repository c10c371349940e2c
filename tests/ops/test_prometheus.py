"""A real Prometheus scrapes a loaded server, and every query of the dashboard and of the alerts is put to it.

Needs the programs ``prometheus`` and ``promtool`` (``make test-ops``).
"""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import RunningServer
from tests.ops.observed import DOCKER, alert_queries, answers, ask, lacks_data, panel_queries, put_under_load
from tests.waiting import wait_until

pytestmark = pytest.mark.ops

SCRAPE_SECONDS = 1
LOADED_SECONDS = 15


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, str]]:
    """A server with two API processes that has been under load for a while, and the URL of its Prometheus."""
    folder = tmp_path_factory.mktemp("ops")
    with RunningServer(folder / "server", "--api-server-count", "2") as server:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = (DOCKER / "prometheus" / "prometheus.yml").read_text()
        assert "gale:8000" in config and "scrape_interval: 5s" in config
        address = server.base_url.removeprefix("http://")
        config = config.replace("gale:8000", address).replace("interval: 5s", f"interval: {SCRAPE_SECONDS}s")
        (folder / "prometheus.yml").write_text(config)
        (folder / "alerts.yml").write_text((DOCKER / "prometheus" / "alerts.yml").read_text())
        command = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (folder / "log").open("wb") as log:
            prometheus = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{url}/-/ready"))
            put_under_load(server.base_url, LOADED_SECONDS)
            time.sleep(2 * SCRAPE_SECONDS)
            yield server, url
        finally:
            prometheus.terminate()
            prometheus.wait()


@pytest.mark.parametrize(("title", "queries"), panel_queries().items(), ids=panel_queries())
def test_every_panel_has_data(loaded: tuple[RunningServer, str], title: str, queries: list[str]) -> None:
    for query in queries:
        series = ask(loaded[1], query)
        assert not lacks_data(series), f"{title}: {query}: {series}"


@pytest.mark.parametrize(("name", "query"), alert_queries().items(), ids=alert_queries())
def test_every_alert_is_evaluated_and_none_fires(loaded: tuple[RunningServer, str], name: str, query: str) -> None:
    assert ask(loaded[1], query) == [], f"{name} fires on a server that is well"
    rules = httpx.get(f"{loaded[1]}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    [rule] = [rule for rule in rules if rule["name"] == name]
    assert rule["health"] == "ok", rule


def test_the_alert_of_a_dead_engine_fires(loaded: tuple[RunningServer, str]) -> None:
    server, url = loaded
    server.child("gale-engine").kill()
    wait_until(lambda: bool(ask(url, alert_queries()["GaleEngineDied"])))
    server.wait_for_log("the engine process serves again")


def test_promtool_has_nothing_to_say(loaded: tuple[RunningServer, str]) -> None:
    text = httpx.get(f"{loaded[0].base_url}/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_rules_and_dashboard_are_valid() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", DOCKER / "prometheus" / "prometheus.yml"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "gale.json").read_text())
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    for path in Path(DOCKER / "grafana" / "provisioning").rglob("*.yaml"):
        assert "apiVersion: 1" in path.read_text()
