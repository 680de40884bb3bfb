"""What prometheus.yml scrapes and alerts.yml asks for is what the composed services export."""

from __future__ import annotations

import re
from typing import Any, Final

import yaml
from prometheus_client import CollectorRegistry

from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metrics import CallMetrics
from holdfast_storagenode.healing.status import HealingStatus
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.metrics import NodeMetrics
from tests.meta.tree import ROOT

DEPLOY: Final = ROOT / "deploy"
SUFFIXES: Final = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}


def load(name: str) -> Any:
    """A YAML file of deploy/."""
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def exported() -> set[str]:
    """Names of the series that the two services export."""
    registry = CollectorRegistry()
    CallMetrics(registry)
    CoordinatorMetrics(registry, SystemClock())
    node = NodeMetrics(registry, get_log("storagenode"))
    node.watch_store(MemoryStore(partition_of=lambda _: 0).status)
    node.watch_healing(HealingStatus())
    return {metric.name + suffix for metric in registry.collect() for suffix in SUFFIXES[metric.type]}


def test_every_service_s_metrics_page_is_scraped() -> None:
    pages = set()
    for name, service in load("compose.yaml")["services"].items():
        for word in service.get("command", ()):
            if word.startswith("--metrics="):
                pages.add(f"{name}:{word.rpartition(':')[2]}")
    scraped = {
        target
        for job in load("prometheus.yml")["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    assert scraped == pages
    assert len(pages) == 6


def test_rules_are_where_prometheus_looks_for_them() -> None:
    mounts = load("compose.yaml")["services"]["prometheus"]["volumes"]
    for rules in load("prometheus.yml")["rule_files"]:
        assert f"./{rules}:/etc/prometheus/{rules}:ro" in mounts
        assert (DEPLOY / rules).is_file()


def test_alerts_ask_for_metrics_that_exist() -> None:
    names = exported()
    rules = [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]
    assert rules
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        asked = set(re.findall(r"\bholdfast_\w+", rule["expr"]))
        assert asked <= names, rule["alert"]
        assert asked or rule["expr"].startswith("up{"), rule["alert"]
    assert "holdfast_node_blocks_total" in names
    assert "holdfast_node_block_total" not in names
