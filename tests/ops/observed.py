"""The queries of the dashboard and of the alerts, as they stand in docker/."""

import json
import re
from pathlib import Path

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
