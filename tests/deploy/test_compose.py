from __future__ import annotations

import importlib.resources
import json
import re
import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import pytest

from deploy_files import DEPLOY, dockerfile_steps, output_of, read_yaml, seconds

FILES = ("compose.yaml", "compose.cuda.yaml", "compose.cluster.yaml")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("compose.yaml")["services"]
    return found


@pytest.mark.parametrize("name", FILES)
def test_files_fit_the_compose_specification(name: str) -> None:
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas.vendor", reason="check-jsonschema has the schema")
    validator_for = pytest.importorskip("jsonschema_rs").validator_for
    text = importlib.resources.files(schemas).joinpath("compose-spec.json").read_text(encoding="utf-8")
    errors = [
        f"{error.instance_path}: {error}" for error in validator_for(json.loads(text)).iter_errors(read_yaml(name))
    ]
    assert not errors


def test_docker_compose_reads_the_files() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker's compose plugin is not installed")
    files = [argument for name in FILES for argument in ("--file", name)]
    environment = ("env", "PHOTOS=/srv/photos", "POSTGRES_PASSWORD=a", "GRAFANA_PASSWORD=b")
    assert "10001" in output_of(*environment, docker, "compose", *files, "config", cwd=DEPLOY)


def test_every_service_gives_up_what_it_does_not_need(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["user"].split(":")[0] not in ("", "0", "root"), name
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"]), name


def test_every_service_has_a_healthcheck(services: dict[str, Any]) -> None:
    in_image = {"dino-search"} if any(step == "HEALTHCHECK" for _, step, _ in dockerfile_steps()) else set()
    assert {name for name, service in services.items() if "healthcheck" in service} | in_image == set(services)


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert set(published) == {"dino-search", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published.values())


def test_only_the_service_reaches_the_database(services: dict[str, Any]) -> None:
    assert {name for name, service in services.items() if "database" in service["networks"]} == {
        "dino-search",
        "postgres",
    }
    assert services["postgres"]["networks"] == ["database"]
    assert read_yaml("compose.yaml")["networks"]["database"]["internal"] is True


def test_passwords_come_from_outside_and_have_no_default(services: dict[str, Any]) -> None:
    found = []
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name:
                found.append(name)
                assert re.fullmatch(r"\$\{[A-Z_]+:\?.+\}", value), name
    assert sorted(found) == ["GF_SECURITY_ADMIN_PASSWORD", "PGPASSWORD", "POSTGRES_PASSWORD"]
    url = urlsplit(services["dino-search"]["environment"]["DINO_SEARCH_DATABASE"])
    assert (url.scheme, url.username, url.password) == ("postgresql", "dino_search", None)


def test_example_names_each_variable_and_no_password() -> None:
    text = "".join((DEPLOY / name).read_text(encoding="utf-8") for name in FILES)
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    lines = (DEPLOY / ".env.example").read_text(encoding="utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    indexes = {"TORCH_CPU_INDEX", "TORCH_CUDA_INDEX", "PYPI_INDEX"}  # for mirrors; README.md has them
    assert used - indexes == set(example)
    required = set(re.findall(r"\$\{([A-Z_]+):\?", text))
    assert {name for name, value in example.items() if not value} == required


def test_mounted_files_exist(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service["volumes"] if isinstance(mount, str)]
    files = [mount for mount in mounts if mount.startswith(".")]
    assert len(files) == 3
    for mount in files:
        assert mount.endswith(":ro")
        assert (DEPLOY / mount.split(":")[0]).exists()
    photos = services["dino-search"]["volumes"][1]
    assert (photos["target"], photos["read_only"]) == ("/photos", True)


def test_threads_are_as_many_as_processors(services: dict[str, Any]) -> None:
    service = services["dino-search"]
    assert service["environment"]["OMP_NUM_THREADS"] == service["deploy"]["resources"]["limits"]["cpus"]


def test_requests_may_end_before_the_container_is_killed(services: dict[str, Any]) -> None:
    service = services["dino-search"]
    assert seconds(service["stop_grace_period"]) > seconds(service["environment"]["DINO_SEARCH_DRAIN_S"])


def test_cuda_file_changes_the_service_to_the_other_target() -> None:
    changed = read_yaml("compose.cuda.yaml")["services"]
    assert set(changed) == {"dino-search"}
    assert changed["dino-search"]["build"]["target"] in {stage for stage, _, _ in dockerfile_steps()}
