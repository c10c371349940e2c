"""The queries of the dashboard and of the alerts, as they stand in docker/, and how a Prometheus is asked for them."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "gale.json"
ALERTS = DOCKER / "prometheus" / "alerts.yml"


def panel_queries() -> dict[str, list[str]]:
    """The queries of every panel, by its title."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels}


def alert_queries() -> dict[str, str]:
    """The query of every alert, by its name."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def metric_names(query: str) -> set[str]:
    """The series of ours that a query names."""
    return set(re.findall(r"\bgale_\w+", query))


def put_under_load(base_url: str, seconds: float) -> None:
    """Ask a server for completions for so long, now and then with a mistake, and with a look at its health."""
    load = ("--num-prompts", "12", "--random-input-len", "60", "--random-output-len", "20", "--max-concurrency", "4")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        bench = [sys.executable, "-m", "server", "bench", "--base-url", base_url, *load]
        subprocess.run(bench, check=True, capture_output=True, timeout=120)
        httpx.post(f"{base_url}/v1/completions", json={})
        httpx.get(f"{base_url}/health")


def answers(url: str) -> bool:
    """Whether it is there and well."""
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def ask(prometheus: str, query: str) -> list[Any]:
    """The series that a query finds.

    Args:
        prometheus: URL.
    """
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query.replace("$__rate_interval", "30s")})
    assert answer.status_code == 200, f"{query}: {answer.text}"
    result: list[Any] = answer.json()["data"]["result"]
    return result


def lacks_data(series: list[Any]) -> bool:
    """Whether a panel would show nothing, or nothing for one of them."""
    return not series or any(value == "NaN" for _, value in (entry["value"] for entry in series))
