"""What the chart becomes, by the real helm: objects that fit the operator's code, and values that are checked."""

from __future__ import annotations

import base64
import re
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import posttrain
from posttrain.control.app import _parse_options
from posttrain.settings import Settings, load_settings
from tests.support.chart_rights import read_rights
from tests.support.helm import CHART, HelmRefused, Manifest, helm, pick, render

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "images": {"trainer": "registry.example.com/trainer@sha256:" + "0" * 64},
    "profiles": {
        "h100": {
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "pricePerGpuHour": "2.40",
        }
    },
    "defaultProfile": "h100",
    "operator": {"resyncSeconds": 1_000_000},
}
FULL: dict[str, Any] = {
    "image": {"repository": "registry.example.com/operator", "digest": "sha256:" + "a" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "replicas": 3,
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "system-cluster-critical",
    "podLabels": {"team": "platform", "app.kubernetes.io/name": "not-ours"},
    "podAnnotations": {"note": "x"},
    "service": {"annotations": {"note": "x"}},
    "certificate": {"secretName": "own-certificate"},
    "networkPolicy": {"enabled": False},
    "crds": {"install": False},
    "rbac": {"aggregate": False},
    "settings": SETTINGS,
}


@pytest.fixture(scope="module")
def objects() -> list[Manifest]:
    """The objects of the chart as it is."""
    return render()


@pytest.fixture(scope="module")
def full() -> list[Manifest]:
    """The objects with a value for everything."""
    return render(FULL, release="other", namespace="elsewhere")


def read_settings(objects: list[Manifest], folder: Path, *, name: str = "posttrain-settings") -> Settings:
    file = folder / "settings.yaml"
    file.write_text(pick(objects, "ConfigMap", name)["data"]["settings.yaml"])
    return load_settings(file)


def pod_of(objects: list[Manifest], name: str = "posttrain-operator") -> dict[str, Any]:
    spec: dict[str, Any] = pick(objects, "Deployment", name)["spec"]["template"]["spec"]
    return spec


# --- The chart -------------------------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(FULL))

    helm("lint", "--strict", CHART)
    helm("lint", "--strict", CHART, "--values", values)


def test_its_version_is_the_projects() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert (chart["version"], chart["appVersion"]) == (posttrain.__version__, posttrain.__version__)
    assert Settings().images.trainer.endswith(f":{posttrain.__version__}")


def test_it_becomes_these_objects(objects: list[Manifest]) -> None:
    assert sorted((item["kind"], item["metadata"]["name"]) for item in objects) == [
        ("ClusterRole", "posttrain-edit"),
        ("ClusterRole", "posttrain-operator"),
        ("ClusterRole", "posttrain-view"),
        ("ClusterRoleBinding", "posttrain-operator"),
        ("ConfigMap", "posttrain-settings"),
        ("CustomResourceDefinition", "trainingruns.posttrain.dev"),
        ("Deployment", "posttrain-operator"),
        ("NetworkPolicy", "posttrain-operator"),
        ("PodDisruptionBudget", "posttrain-operator"),
        ("Role", "posttrain-operator"),
        ("RoleBinding", "posttrain-operator"),
        ("Secret", "posttrain-progress-tls"),
        ("Service", "posttrain-progress"),
        ("ServiceAccount", "posttrain-operator"),
    ]


def test_what_is_turned_off_is_not_there(full: list[Manifest]) -> None:
    kinds = {item["kind"] for item in full}

    assert not kinds & {"CustomResourceDefinition", "NetworkPolicy", "Secret"}
    labels = [pick(full, "ClusterRole", f"other-posttrain-{role}")["metadata"]["labels"] for role in ("edit", "view")]
    assert not [key for found in labels for key in found if "aggregate" in key]


def test_its_definitions_are_the_generated_ones_and_stay_at_an_uninstallation(objects: list[Manifest]) -> None:
    generated = {file.name: yaml.safe_load(file.read_text()) for file in (ROOT / "crds").glob("*.yaml")}
    rendered = [item for item in objects if item["kind"] == "CustomResourceDefinition"]

    for definition in rendered:
        assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert rendered == list(generated.values())


def test_every_namespaced_object_is_in_the_releases_namespace(full: list[Manifest]) -> None:
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}

    assert {item["metadata"].get("namespace") for item in full if item["kind"] not in cluster_wide} == {"elsewhere"}
    for binding in ("ClusterRoleBinding", "RoleBinding"):
        found = pick(full, binding, "other-posttrain-operator")
        assert found["subjects"] == [
            {"kind": "ServiceAccount", "name": "other-posttrain-operator", "namespace": "elsewhere"}
        ]
        assert found["roleRef"]["name"] == "other-posttrain-operator"


def test_the_rights_that_other_tests_read_from_the_template_are_those_that_helm_renders() -> None:
    full = render(FULL, release="other", namespace="elsewhere")
    lease = "other-posttrain-operator"
    read = read_rights(release="other-posttrain", namespace="elsewhere", lease=lease)
    kinds = {item["kind"] for item in read}

    rendered = [item for item in full if item["kind"] in kinds]
    for item in rendered:
        del item["metadata"]["labels"]
    assert sorted(rendered, key=str) == sorted(read, key=str)


# --- The pods --------------------------------------------------------------------------------------------------------


def test_a_silent_node_is_left_after_half_a_minute_whatever_else_is_tolerated(
    objects: list[Manifest], full: list[Manifest]
) -> None:
    silent = [
        {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}
        for taint in ("not-ready", "unreachable")
    ]

    assert pod_of(objects)["tolerations"] == silent
    assert pod_of(full, "other-posttrain-operator")["tolerations"] == [*silent, *FULL["tolerations"]]


def test_a_pod_complies_with_the_restricted_pod_security_standard(objects: list[Manifest]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and more."""
    pod = pod_of(objects)
    (container,) = pod["containers"]

    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    sources = {source for volume in pod["volumes"] for source in volume.keys() - {"name"}}
    assert sources == {"configMap", "secret", "emptyDir"}
    assert not any("hostPort" in port for port in container["ports"])
    assert container["resources"].keys() == {"requests", "limits"}


def test_its_options_are_the_processes_own(objects: list[Manifest]) -> None:
    pod = pod_of(objects)
    (container,) = pod["containers"]

    options = vars(_parse_options(container["args"]))

    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert options["settings"] == Path(mounts["settings"]) / "settings.yaml"
    assert options["health_address"] == f"0.0.0.0:{ports['health']}"
    assert options["serve_address"] == f"0.0.0.0:{ports['progress']}"
    files = {options["tls_certificate"], options["tls_key"], options["tls_authority"]}
    (tls,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "tls"]
    assert files == {Path(mounts["tls"]) / item["path"] for item in tls["items"]}


def test_it_is_probed_where_it_answers(objects: list[Manifest]) -> None:
    (container,) = pod_of(objects)["containers"]

    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}


def test_the_image_is_the_charts_own_version_or_a_digest(objects: list[Manifest], full: list[Manifest]) -> None:
    assert pod_of(objects)["containers"][0]["image"] == f"ghcr.io/posttrain/operator:{posttrain.__version__}"
    (container,) = pod_of(full, "other-posttrain-operator")["containers"]
    assert container["image"] == "registry.example.com/operator@sha256:" + "a" * 64


def test_service_budget_and_policy_select_the_pods(objects: list[Manifest]) -> None:
    deployment = pick(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]

    selectors = [
        deployment["selector"]["matchLabels"],
        pick(objects, "Service", "posttrain-progress")["spec"]["selector"],
        pick(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        pick(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == selectors[0] and selector.items() <= labels.items() for selector in selectors)


def test_the_pods_own_labels_cannot_be_taken_from_them(full: list[Manifest]) -> None:
    labels = pick(full, "Deployment", "other-posttrain-operator")["spec"]["template"]["metadata"]["labels"]

    assert labels["team"] == "platform"
    assert labels["app.kubernetes.io/name"] == "posttrain"


def test_other_settings_are_other_pods(objects: list[Manifest]) -> None:
    def annotations(found: list[Manifest]) -> dict[str, str]:
        template: dict[str, str] = pick(found, "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return template

    assert annotations(render()) == annotations(objects)
    assert annotations(render({"settings": {"prepareCpu": "4"}})) != annotations(objects)


def test_connections_are_limited_to_the_two_ports(objects: list[Manifest]) -> None:
    policy = pick(objects, "NetworkPolicy")["spec"]

    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [
        {"from": [{"namespaceSelector": {}}], "ports": [{"port": "progress"}]},
        {"ports": [{"port": "health"}]},
    ]


# --- Settings and certificate ----------------------------------------------------------------------------------------


def test_the_settings_without_any_value_are_the_defaults(objects: list[Manifest], tmp_path: Path) -> None:
    """In the namespace and under the release's name that the documentation takes."""
    assert read_settings(objects, tmp_path) == Settings()


def test_the_settings_are_those_among_the_values(full: list[Manifest], tmp_path: Path) -> None:
    settings = read_settings(full, tmp_path, name="other-posttrain-settings")

    expected = {
        **SETTINGS,
        "operator": {"resyncSeconds": 1_000_000, "leaseName": "other-posttrain-operator"},
        "progressServer": {"url": "https://other-posttrain-progress.elsewhere.svc:8443"},
    }
    assert settings == Settings.model_validate(expected)


def test_pods_report_to_the_service(full: list[Manifest], tmp_path: Path) -> None:
    service = pick(full, "Service", "other-posttrain-progress")
    url = urlsplit(read_settings(full, tmp_path, name="other-posttrain-settings").progress_server.url)

    assert url.hostname == f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert [url.port] == [port["port"] for port in service["spec"]["ports"]]


def test_the_role_is_for_the_settings_lease() -> None:
    objects = render({"settings": {"operator": {"leaseName": "mine"}}})

    names = [rule.get("resourceNames") for rule in pick(objects, "Role")["rules"]]
    assert names == [None, ["mine"]]


@pytest.mark.parametrize("host", ["posttrain-progress.posttrain-system.svc", "reports.example.com"])
def test_the_certificate_is_for_the_host_that_pods_report_to(host: str, tmp_path: Path) -> None:
    url = f"https://{host}:8443"
    secret = pick(render({"settings": {"progressServer": {"url": url}}}), "Secret", "posttrain-progress-tls")
    for name, text in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(text))

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))

    assert shake_hands(client, server, host=host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(client, server, host="another.example.com")
    assert set(secret["data"]) == {"tls.crt", "tls.key", "ca.crt"}
    renewal = datetime.fromtimestamp(int(secret["metadata"]["annotations"]["posttrain.dev/renew-after"]), UTC)
    assert abs(renewal - datetime.now(UTC) - timedelta(days=3620)) < timedelta(hours=1)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, *, host: str) -> bool:
    """Return whether both sides end a TLS handshake, in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)
    return not sides


def test_a_certificate_of_ones_own_is_mounted(full: list[Manifest]) -> None:
    (tls,) = [v for v in pod_of(full, "other-posttrain-operator")["volumes"] if v["name"] == "tls"]

    assert tls["secret"]["secretName"] == "own-certificate"


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 1}, "additional properties 'replica' not allowed"),
        ({"replicas": 0}, "/replicas"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"settings": {"profiles": {"h100": {"gpuMemry": "80Gi"}}}}, "additional properties 'gpuMemry' not allowed"),
        ({"settings": {"profiles": {"h100": {"pricePerGpuHour": 2.4}}}}, "/settings/profiles/h100/pricePerGpuHour"),
        ({"logLevel": "verbose"}, "/logLevel"),
    ],
)
def test_a_value_that_is_none_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmRefused, match=re.escape(message)):
        render(values)


def test_it_can_be_a_part_of_another_chart() -> None:
    render({"global": {"imageRegistry": "registry.example.com"}})


def leaves(node: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values by their path; an empty map is one."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, dict) and value else {f"{path}{name}": value}
    return found


def test_the_readme_names_every_value_with_its_default() -> None:
    values = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", (CHART / "README.md").read_text(), re.MULTILINE)

    assert {name: yaml.safe_load(default) for name, default in rows} == values


def test_the_examples_of_the_documentation_are_values() -> None:
    (guide,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "installation.md").read_text(), re.DOTALL)
    comment = re.search(r"^#   settings:\n(#     .*\n)+", (CHART / "values.yaml").read_text(), re.MULTILINE)
    assert comment is not None
    example = re.sub("^#   ", "", comment[0], flags=re.MULTILINE)

    for values in (yaml.safe_load(guide), yaml.safe_load(example)):
        render(values)
        assert Settings.model_validate(values["settings"]).default_profile == "h100"


def test_the_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/generate_chart.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
