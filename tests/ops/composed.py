"""Puts a composition that runs under load, and asks its Prometheus for every panel and every alert.

    python -m tests.ops.composed --gale http://127.0.0.1:8000 --prometheus http://127.0.0.1:9090 [--grafana URL]

``docker/compose-test`` runs it. Exits with 1, and says why, where a query has no data, an alert fires or cannot be
evaluated, or Grafana does not show the dashboard.
"""

import argparse
import sys
import time

import httpx

from tests.ops.observed import alert_queries, answers, ask, lacks_data, panel_queries, put_under_load
from tests.waiting import wait_until

LOADED_SECONDS = 45
"""Several of the composition's scrapes, which are 5 seconds apart."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.composed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gale", required=True, metavar="URL")
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--grafana", metavar="URL")
    args = parser.parse_args()
    for url in (f"{args.gale}/health", f"{args.prometheus}/-/ready"):
        wait_until(lambda url=url: answers(url))  # type: ignore[misc]
    put_under_load(args.gale, LOADED_SECONDS)
    time.sleep(10)  # two scrapes
    panels = panel_queries()
    faults = [
        f"{title}: {query} has no data"
        for title, queries in panels.items()
        for query in queries
        if lacks_data(ask(args.prometheus, query))
    ]
    faults += [f"{name} fires" for name, query in alert_queries().items() if ask(args.prometheus, query)]
    rules = httpx.get(f"{args.prometheus}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    faults += [f"{rule['name']} is {rule['health']}" for rule in rules if rule["health"] != "ok"]
    if {rule["name"] for rule in rules} != set(alert_queries()):
        faults.append("Prometheus does not have all rules")
    if args.grafana is not None:
        wait_until(lambda: answers(f"{args.grafana}/api/health"))
        found = httpx.get(f"{args.grafana}/api/search", params={"query": "Gale"}).json()
        if not found:
            faults.append("Grafana has no dashboard")
    for fault in faults:
        print(fault, file=sys.stderr)
    queries = sum(map(len, panels.values()))
    print(f"{len(panels)} panels with {queries} queries, {len(rules)} alerts: {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
