from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from deploy_files import DEPLOY, dashboard, output_of, panels, program, queries, read_yaml

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
OWN = {"up"}
"""What Prometheus itself measures."""


@pytest.fixture(scope="module")
def measured() -> dict[str, set[str]]:
    """Series that the service writes, and their labels."""
    metrics = pytest.importorskip("dino_search.api.metrics").Metrics()
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        # A family without labelled series has no samples yet: its names follow from its type.
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        labels = _labels_of(metrics, family.name)
        for ending in endings:
            found[family.name + ending] = labels | ({"le"} if ending == "_bucket" else set())
    return found


def test_queries_name_what_the_service_measures(measured: dict[str, set[str]]) -> None:
    for query in (*queries(), *_alert_queries()):
        assert _metrics_in(query), query
        assert _metrics_in(query) <= set(measured) | OWN, query


def test_queries_ask_for_labels_that_there_are(measured: dict[str, set[str]]) -> None:
    for query in (*queries(), *_alert_queries()):
        known = {"instance", "job"}.union(*(measured.get(name, set()) for name in _metrics_in(query)))
        assert _labels_in(query) <= known, query


def test_dashboard_shows_everything_that_is_measured(measured: dict[str, set[str]]) -> None:
    shown = set().union(*(_metrics_in(query) for query in queries()))
    families = {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in measured if name.startswith("dino_search")}
    assert families == {
        re.sub(r"_(bucket|count|sum|total)$", "", name) for name in shown if name.startswith("dino_search")
    }


def test_panels_have_names_and_places_of_their_own() -> None:
    found = list(panels())
    assert len({panel["id"] for panel in found}) == len(found)
    for one, other in itertools.combinations((panel["gridPos"] for panel in found), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in found)


def test_grafana_finds_dashboard_and_data_where_compose_puts_them() -> None:
    services = read_yaml("compose.yaml")["services"]
    (provider,) = read_yaml("grafana", "provisioning", "dashboards", "dino-search.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    (source,) = read_yaml("grafana", "provisioning", "datasources", "prometheus.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (chosen,) = (one for one in dashboard()["templating"]["list"] if one["type"] == "datasource")
    assert chosen["query"] == source["type"]
    (scrape,) = read_yaml("prometheus", "prometheus.yml")["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["dino-search:8000"]
    assert "dino-search" in services


def test_promtool_accepts_configuration_and_alerts() -> None:
    assert "SUCCESS" in output_of(program("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_alerts_fire_and_stay_quiet_where_they_should() -> None:
    assert "SUCCESS" in output_of(program("promtool"), "test", "rules", Path(__file__).with_name("alerts_test.yml"))


def test_each_alert_is_tried() -> None:
    names = {rule["alert"] for group in read_yaml("prometheus", "alerts.yml")["groups"] for rule in group["rules"]}
    tests = yaml.safe_load(Path(__file__).with_name("alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert fired == names


def test_promtool_reads_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in output_of(program("promtool"), "check", "rules", file)


def _alert_queries() -> list[str]:
    return [rule["expr"] for group in read_yaml("prometheus", "alerts.yml")["groups"] for rule in group["rules"]]


def _metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:dino_search|process|python)_\w+|\bup\b", re.sub(r'"[^"]*"', "", query)))


def _labels_in(query: str) -> set[str]:
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    grouped = re.findall(r"\bby\s*\(([^)]*)\)", query)
    return set(selected) | {label.strip() for group in grouped for label in group.split(",")}


def _labels_of(metrics: object, family: str) -> set[str]:
    for metric in vars(metrics).values():
        if getattr(metric, "_name", None) == family:
            return set(metric._labelnames)
    return set()
