"""The dashboard asks for metrics that the front reports, and the containers' files parse."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from layout.sources import HOME
from trireme.serve.metrics import FAMILIES

DOCKER = HOME / "docker"


def test_every_metric_of_the_dashboard_is_reported():
    panels = json.loads((DOCKER / "grafana/dashboards/trireme.json").read_text())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in re.findall(r"trireme_(\w+)", target["expr"])}
    assert asked and asked <= set(FAMILIES)


@pytest.mark.parametrize("path", sorted(path.relative_to(DOCKER) for path in DOCKER.rglob("*.y*ml")), ids=str)
def test_yaml_parses(path):
    assert yaml.safe_load((DOCKER / path).read_text())
