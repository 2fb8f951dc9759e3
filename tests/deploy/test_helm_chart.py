"""The chart, rendered by Helm's own library where it is installed (`helm-python-sdk`), and read as text everywhere."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from deploy_files import CHART, DRAIN_S, read_yaml

SHARED = {
    "replicas": 3,
    "database": {"existingSecret": "catalog"},
    "persistence": {"accessMode": "ReadWriteMany", "storageClass": "nfs"},
}
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "cluster": read_yaml("helm", "values-cluster.yaml"),
    "everything": {
        **SHARED,
        "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls"},
        "serviceMonitor": {"enabled": True},
        "autoscaling": {"enabled": True},
        "photos": {"volume": {"nfs": {"server": "nas.example.org", "path": "/photos"}}},
        "settings": {"max_body_bytes": 67108864, "max_wait_ms": 2.5, "fetch_urls": False, "drain_s": 90},
        "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    },
    "trial": {
        "database": {"url": "postgresql://me:secret@db/catalog"},
        "persistence": {"enabled": False},
        "photos": {"existingClaim": "photos"},
        "settings": {"keys": "off", "allow_public_without_keys": True},
    },
}


def test_values_fit_their_schema() -> None:
    validator_for = pytest.importorskip("jsonschema_rs").validator_for
    validator = validator_for(json.loads((CHART / "values.schema.json").read_text(encoding="utf-8")))
    values = read_yaml("helm", "dino-search", "values.yaml")
    assert [str(error) for error in validator.iter_errors(values)] == []
    assert not validator.is_valid({**values, "replicas": 0})
    assert not validator.is_valid({**values, "replica": 1}), "a misspelt name is an error"
    for name in ("image", "database", "persistence", "networkPolicy", "gpu"):
        assert not validator.is_valid({**values, name: {**values[name], "misspelt": 1}})


def test_schema_names_the_values_that_there_are() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = read_yaml("helm", "dino-search", "values.yaml")
    assert set(schema["properties"]) - {"global"} == set(values)
    for name, described in schema["properties"].items():
        if described.get("additionalProperties") is False:
            assert set(described["properties"]) == set(values[name]), name


def test_templates_and_values_name_the_same_things() -> None:
    values = read_yaml("helm", "dino-search", "values.yaml")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir()))
    used = set(re.findall(r"\.Values\.([A-Za-z]+(?:\.[A-Za-z]+)?)", text))
    free = {path for path in used if path.startswith("settings.")}
    for path in used - free:
        top, _, rest = path.partition(".")
        assert top in values, path
        assert not rest or rest in values[top], path
    assert {path.partition(".")[0] for path in used} == set(values)


def test_definitions_that_templates_include_exist() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir()))
    assert set(re.findall(r'include "([^"]+)"', text)) == set(re.findall(r'define "([^"]+)"', text))
    assert text.count("{{") == text.count("}}")


def test_helm_lints_the_chart() -> None:
    chart = pytest.importorskip("helm_python.chart", reason="helm-python-sdk is not installed")
    for values in CASES.values():
        report = chart.lint(CHART, _over_defaults(values), strict=True)
        findings = [message["error"] for message in report["messages"] if message["severity"] > 1]
        assert (findings, report["errors"]) == ([], [])


@pytest.mark.parametrize("case", CASES)
def test_rendered_objects_fit_kubernetes(case: str) -> None:
    objects = _render(CASES[case])
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for rendered in objects:
        if rendered["kind"] != "ServiceMonitor":  # not Kubernetes' own
            validate(rendered, "1.30", strict=True)


@pytest.mark.parametrize("case", CASES)
def test_pod_is_locked_in_and_has_time_to_end(case: str) -> None:
    pod = _pod(CASES[case])
    drain_s = CASES[case].get("settings", {}).get("drain_s", DRAIN_S)
    assert pod["terminationGracePeriodSeconds"] > drain_s + 5
    # The Service's variables would overwrite the service's own: DINO_SEARCH_PORT=tcp://...
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"/data", "/tmp"}
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert probes == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_settings_become_variables_as_they_were_written() -> None:
    variables = {one["name"]: one.get("value") for one in _pod(CASES["everything"])["containers"][0]["env"]}
    assert variables["DINO_SEARCH_MAX_BODY_BYTES"] == "67108864"
    assert variables["DINO_SEARCH_MAX_WAIT_MS"] == "2.5"
    assert variables["DINO_SEARCH_FETCH_URLS"] == "false"
    assert variables["DINO_SEARCH_DEVICE"] == "cuda"
    assert variables["DINO_SEARCH_KEYS"] == "required"


def test_threads_are_as_many_as_processors() -> None:
    sources = {one["name"]: one.get("valueFrom") for one in _pod({})["containers"][0]["env"]}
    assert sources["OMP_NUM_THREADS"]["resourceFieldRef"]["resource"] == "limits.cpu"
    unlimited = _pod({"resources": {"limits": {"cpu": None}}})["containers"][0]["env"]
    assert "OMP_NUM_THREADS" not in {one["name"] for one in unlimited}


def test_database_url_is_in_a_secret_only() -> None:
    objects = _render(CASES["trial"])
    holding = {one["kind"] for one in objects if "me:secret" in yaml.safe_dump(one)}
    assert holding == {"Secret"}
    (reference,) = (
        one for one in _pod(CASES["everything"])["containers"][0]["env"] if one["name"] == "DINO_SEARCH_DATABASE"
    )
    assert reference["valueFrom"]["secretKeyRef"] == {"name": "catalog", "key": "url"}


def test_gpu_is_asked_for_and_takes_the_cuda_image() -> None:
    (container,) = _pod(CASES["everything"])["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"].endswith("-cuda")
    assert "nvidia.com/gpu" not in _pod({})["containers"][0]["resources"]["limits"]


def test_one_replica_is_replaced_and_several_roll() -> None:
    assert _of_kind(_render({}), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert _of_kind(_render(SHARED), "Deployment")["spec"]["strategy"]["type"] == "RollingUpdate"


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"replicas": 2}, "database"),
        ({**SHARED, "persistence": {"enabled": False}}, "persistence.enabled"),
        ({**SHARED, "persistence": {"accessMode": "ReadWriteOnce"}}, "ReadWriteMany"),
        ({"database": {"existingSecret": "a", "url": "postgresql://b"}}, "not both"),
        ({"settings": {"port": 9000}}, "settings.port"),
        ({"settings": {"keys": "off"}}, "allow_public_without_keys"),
    ],
)
def test_values_that_do_not_go_together_are_refused(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(Exception, match=re.escape(advice)):
        _render(values)


def _render(values: dict[str, Any]) -> list[Any]:
    """The objects that `helm template` would print."""
    chart = pytest.importorskip("helm_python.chart", reason="helm-python-sdk is not installed")
    with chart.Chart.load(CHART) as loaded:
        rendered = loaded.render(values, name="pictures", namespace="search")
    files = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [one for text in files for one in yaml.safe_load_all(text) if one is not None]


def _of_kind(objects: list[Any], kind: str) -> Any:
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


def _pod(values: dict[str, Any]) -> Any:
    return _of_kind(_render(values), "Deployment")["spec"]["template"]["spec"]


def _over_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges them, which its linter leaves to the caller."""
    merged: dict[str, Any] = read_yaml("helm", "dino-search", "values.yaml")
    for name, value in values.items():
        merged[name] = {**merged[name], **value} if isinstance(value, dict) else value
    return merged
