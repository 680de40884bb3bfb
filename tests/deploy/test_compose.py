"""compose.yaml as the engines and the programs would read it: a misspelt option, variable or name fails here."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import unittest.mock
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from holdfast_coordinator.access.certificates import Certificates
from tests.meta import commands
from tests.meta.tree import ROOT
from tests.support.etcd import find_program

DEPLOY: Final = ROOT / "deploy"
ETCD: Final = ["etcd-1", "etcd-2", "etcd-3"]
COORDINATORS: Final = ["coordinator-1", "coordinator-2"]
NODES: Final = ["node-1", "node-2", "node-3", "node-4"]
OURS: Final = {
    **dict.fromkeys(COORDINATORS, ("coordinator",)),
    **dict.fromkeys(NODES, ("storagenode",)),
    "client": (),
}
"""Our services, each with the words that its image's entry point puts before `command`."""

# What the Compose specification allows and this file uses; a key outside it is a slip.
SERVICE_KEYS: Final = {
    *("image", "build", "command", "environment", "networks", "volumes", "secrets", "depends_on", "healthcheck"),
    *("restart", "ports", "profiles", "hostname", "stop_grace_period", "read_only", "cap_drop", "security_opt"),
    "tmpfs",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file, parsed, with its anchors resolved."""
    parsed: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return parsed


def program_faults(service: str, definition: dict[str, Any]) -> list[str]:
    """What the program would refuse of a service's command and variables."""
    entry = OURS[service]
    faults = []
    try:
        # What a variable gives is parsed too.
        with unittest.mock.patch.dict(os.environ, definition["environment"]):
            commands.check([*entry, *definition["command"]])
    except commands.Mistyped as error:
        faults.append(str(error))
    words = list(entry) or definition["command"]
    known = commands.variables_of(words)
    faults += [f"{service}: {name} is read by nothing" for name in definition["environment"] if name not in known]
    faults += [
        f"{service}: {name} is not text" for name, text in definition["environment"].items() if type(text) is not str
    ]
    return faults


@pytest.mark.parametrize("service", OURS)
def test_the_programs_take_the_commands_and_variables(compose: dict[str, Any], service: str) -> None:
    assert not program_faults(service, compose["services"][service])


@pytest.mark.parametrize("slip", ["option", "variable", "value"])
def test_a_slip_is_found(compose: dict[str, Any], slip: str) -> None:
    definition = copy.deepcopy(compose["services"]["coordinator-1"])
    if slip == "option":
        definition["command"].append("--replica=3")
    elif slip == "variable":
        definition["environment"]["HOLDFAST_TLS_CAA"] = "x"
    else:
        definition["command"].append("--replicas=three")
    assert program_faults("coordinator-1", definition)


def test_the_cluster_is_the_one_that_is_promised(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {*ETCD, *COORDINATORS, *NODES, "client", "prometheus"}
    assert all("profiles" in services[name] for name in ("client", "prometheus"))
    zones = {name: services[name]["environment"]["HOLDFAST_ZONE"] for name in NODES}
    assert len(set(zones.values())) == 3
    assert {name: services[name]["environment"]["HOLDFAST_NODE_ID"] for name in NODES} == {name: name for name in NODES}
    for name in COORDINATORS:
        assert f"--nodes={len(NODES)}" in services[name]["command"]


def test_every_key_is_one_that_compose_knows(compose: dict[str, Any]) -> None:
    top = {key for key in compose if not key.startswith("x-")}
    assert top == {"name", "services", "networks", "volumes", "secrets"}
    for name, definition in compose["services"].items():
        assert set(definition) <= SERVICE_KEYS, name


def test_every_service_is_checked_for_health_and_waits_for_what_it_needs(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name in [*ETCD, *COORDINATORS, *NODES]:
        health = services[name]["healthcheck"]
        assert health["test"][0] == "CMD"
        assert set(health) == {"test", "interval", "timeout", "retries", "start_period"}
        assert services[name]["restart"] == "unless-stopped"
    waits = {"condition": "service_healthy"}
    for name in COORDINATORS:
        assert services[name]["depends_on"] == dict.fromkeys(ETCD, waits)
    for name in NODES:
        assert services[name]["depends_on"] == dict.fromkeys(COORDINATORS, waits)


@pytest.mark.parametrize("service", [*COORDINATORS, *NODES])
def test_the_health_check_asks_the_port_that_is_bound(compose: dict[str, Any], service: str) -> None:
    definition = compose["services"][service]
    test = definition["healthcheck"]["test"]
    assert test[1] == "holdfast"
    commands.check(test[2:])
    (bind,) = [each for each in definition["command"] if each.startswith("--bind=")]
    assert test[-1].rpartition(":")[2] == bind.rpartition(":")[2]
    # The check speaks TLS with the service's own certificate, through the same variables.
    assert {"HOLDFAST_TLS_CA", "HOLDFAST_TLS_CERT", "HOLDFAST_TLS_KEY"} <= commands.variables_of(["health"])


def test_what_is_named_is_declared(compose: dict[str, Any]) -> None:
    used: set[str] = set()
    for name, definition in compose["services"].items():
        for volume in definition.get("volumes", ()):
            source, target, *mode = volume.split(":")
            assert target.startswith("/"), volume
            assert mode in ([], ["ro"]), volume
            if not source.startswith("./"):
                used.add(source)
        assert set(definition["networks"]) <= set(compose["networks"]), name
        assert set(definition.get("secrets", ())) <= set(compose["secrets"]), name
    assert used == set(compose["volumes"])


def test_every_store_has_a_volume_of_its_own(compose: dict[str, Any]) -> None:
    places = [volume for name in [*ETCD, *NODES] for volume in compose["services"][name]["volumes"]]
    stores = [volume for volume in places if not volume.startswith("./")]
    assert len(set(stores)) == len(stores) == len(ETCD) + len(NODES)
    for name in NODES:
        assert f"{name}:/var/lib/holdfast" in compose["services"][name]["volumes"]
        assert "--data=/var/lib/holdfast" in compose["services"][name]["command"]


def test_only_coordinators_reach_the_metadata_store(compose: dict[str, Any]) -> None:
    members = {name for name, each in compose["services"].items() if "metadata" in each["networks"]}
    assert members == {*ETCD, *COORDINATORS}
    assert compose["networks"]["metadata"]["internal"] is True


def test_only_coordinators_have_the_master_key(compose: dict[str, Any]) -> None:
    holders = {name for name, each in compose["services"].items() if each.get("secrets")}
    assert holders == set(COORDINATORS)
    for name in COORDINATORS:
        assert "--master-key=/run/secrets/master_key" in compose["services"][name]["command"]


@pytest.mark.parametrize("service", [*COORDINATORS, *NODES])
def test_addresses_lead_to_services_on_a_shared_network(compose: dict[str, Any], service: str) -> None:
    services = compose["services"]
    ports = {**dict.fromkeys(ETCD, "2379"), **dict.fromkeys(COORDINATORS, "7400"), **dict.fromkeys(NODES, "7410")}
    text = " ".join([*services[service]["command"], *services[service]["environment"].values()])
    named = re.findall(r"\b((?:etcd|coordinator|node)-\d):(\d+)", text)
    assert named
    for host, port in named:
        assert port == ports[host]
        assert set(services[host]["networks"]) & set(services[service]["networks"])


def test_images_are_built_from_stages_that_exist(compose: dict[str, Any]) -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for service in OURS:
        build = compose["services"][service]["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert build["target"] in stages
        assert compose["services"][service]["image"] == f"holdfast-{build['target']}"


def test_etcd_takes_its_variables(compose: dict[str, Any]) -> None:
    listed = subprocess.run([find_program("etcd"), "--help"], capture_output=True, text=True, check=True, timeout=20)
    flags = set(re.findall(r"--([a-z-]+)", listed.stdout + listed.stderr))
    assert "initial-cluster-token" in flags
    for name in ETCD:
        environment = compose["services"][name]["environment"]
        assert all(type(value) is str for value in environment.values())
        assert {each.removeprefix("ETCD_").lower().replace("_", "-") for each in environment} <= flags
        assert f"{name}=https://{name}:2380" in environment["ETCD_INITIAL_CLUSTER"].split(",")


@pytest.mark.slow
def test_secrets_that_are_mounted_are_the_ones_that_are_made(compose: dict[str, Any], tmp_path: Path) -> None:
    subprocess.run([DEPLOY / "make-secrets", tmp_path], check=True, capture_output=True, timeout=60)
    for name, definition in compose["services"].items():
        for volume in definition.get("volumes", ()):
            if volume.startswith("./secrets/"):
                folder = tmp_path / volume.partition(":")[0].removeprefix("./secrets/")
                assert {path.name for path in folder.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}, name
    key = bytes.fromhex((tmp_path / Path(compose["secrets"]["master_key"]["file"]).name).read_text(encoding="ascii"))
    assert len(key) == 32
    read = Certificates().read
    principals = {name: read((tmp_path / "tls" / name / "cert.pem").read_bytes()).principal for name in OURS}
    assert principals == {
        **{name: f"spiffe://holdfast/coordinator/{name}" for name in COORDINATORS},
        **{
            name: f"spiffe://holdfast/node/{compose['services'][name]['environment']['HOLDFAST_NODE_ID']}"
            for name in NODES
        },
        "client": "spiffe://holdfast/admin/client",
    }
    assert tmp_path.stat().st_mode & 0o077 == 0
