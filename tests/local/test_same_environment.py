"""A local rank has the environment that its pod has in a cluster; what differs is named here, and nothing else does."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.loader import load_documents
from posttrain.local.cluster import KINDS
from posttrain.local.jobs import injected_env
from posttrain.plan.types import Manifest, ObjectRef
from tests.support.local_cluster import LOCAL_SERVER, PLANNED_SERVER, await_observed, has_condition, open_cluster

GOLDEN = Path(__file__).parents[1] / "golden" / "training_run"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/expected.yaml") if "kind: PyTorchJob\n" in file.read_text())

LAUNCH = """
import json, os, time
from pathlib import Path
storage = Path(os.environ["POSTTRAIN_STORAGE"])
file = storage / f"{os.environ['POSTTRAIN_POD_NAME']}.env"
file.with_suffix(".new").write_text(json.dumps(dict(os.environ)))
file.with_suffix(".new").rename(file)
while len(list(storage.glob("*.env"))) < int(os.environ["PET_NNODES"]):
    time.sleep(0.01)  # the master's end is the job's
"""
SECRETS = {"hf-token": {"token": "hf_x"}, "tracker-keys": {"WANDB_API_KEY": "w"}, "wandb": {"WANDB_API_KEY": "w"}}
SECRETS["demo-server-0b784300"] = {"key": "k"}

OF_THE_MACHINE = {"PATH", "LANG"}
OF_THE_SERVERS = {"POSTTRAIN_ROLLOUT_SERVERS"}
OF_THE_RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


def load_plan(case: str) -> list[Manifest]:
    """Return the objects that a golden case plans, and the ConfigMap of its code where one was made before."""
    files = (GOLDEN / case / "observed.yaml", GOLDEN / case / "expected.yaml")
    observed, expected = (load_documents(file.read_text(), origin=str(file)) for file in files)
    kinds = {kind for _, kind in KINDS} - {"StatefulSet"}  # whose pods are not the gang's
    planned = [document.data for document in expected if document.data.get("kind") in kinds]
    code = [
        m
        for m in observed[0].data.get("objects", [])
        if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "demo-code"
    ]
    return [*code, *planned]


def cluster_env(job: Manifest, *, node: int) -> dict[str, str]:
    """Return the environment of a node's container in a cluster, as its pod spec and the training operator have it."""
    specs = job["spec"]["pytorchReplicaSpecs"]
    container: dict[str, Any] = specs["Master"]["template"]["spec"]["containers"][0]
    name = f"{job['metadata']['name']}-master-0" if node == 0 else f"{job['metadata']['name']}-worker-{node - 1}"
    fields = {"metadata.name": name, "spec.nodeName": "laptop"}
    env: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        env |= SECRETS[source["secretRef"]["name"]]
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            env[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            env[variable["name"]] = SECRETS[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
        else:
            env[variable["name"]] = variable["value"]
    nodes = sum(spec["replicas"] for spec in specs.values())
    address = f"{job['metadata']['name']}-master-0"
    return env | dict(injected_env(job["spec"]["nprocPerNode"], nodes=nodes, node=node, address=address, port=23456))


@pytest.mark.parametrize("case", CASES)
def test_only_mounts_server_rendezvous_and_machine_differ(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    launch = folder / "packages" / "posttrain_workloads" / "launch.py"
    launch.parent.mkdir(parents=True)
    launch.with_name("__init__.py").touch()
    launch.write_text(LAUNCH)
    plan = load_plan(case)
    (job,) = (manifest for manifest in plan if manifest["kind"] == "PyTorchJob")
    ref = ObjectRef.of(job)

    with closing(open_cluster(folder, secrets=SECRETS)) as cluster:
        for manifest in plan:
            cluster.apply(manifest)
        gang = [pod for pod in cluster.observe().pods if pod["metadata"]["labels"]["posttrain.dev/role"] == "trainer"]
        await_observed(cluster, lambda o: has_condition(o, ref, "Succeeded"), what="the end")

    for node, pod in enumerate(gang):
        (file,) = (folder / "volumes").rglob(f"{pod['metadata']['name']}.env")
        local: dict[str, str] = json.loads(file.read_text())
        planned = cluster_env(job, node=node)
        # PYTHONPATH is there for posttrain itself, which an image has installed; own code still comes first.
        code = local.pop("PYTHONPATH").removesuffix(str(folder / "packages"))
        assert bool(code) == ("PYTHONPATH" in planned)
        planned.pop("PYTHONPATH", None)

        assert local.keys() - planned.keys() == OF_THE_MACHINE
        assert planned.keys() - local.keys() == set()
        differing = {name for name in planned if planned[name] != local[name]}
        mounted = {name for name in differing if is_mounted(planned[name], pod=pod)}
        served = {name for name in differing if planned[name].startswith(PLANNED_SERVER)}
        addressed = {name for name in planned if planned[name].startswith("http://demo-sandbox:")}
        of_the_servers = OF_THE_SERVERS & planned.keys()
        assert differing == mounted | served | addressed | OF_THE_RENDEZVOUS | of_the_servers
        assert all(re.fullmatch(r"http://127\.0\.0\.1:[0-9]+", local[name]) for name in addressed)
        assert all(Path(local[name]).is_relative_to(folder) or local[name] == "/" for name in mounted)
        assert {local[name].removeprefix(LOCAL_SERVER) for name in served} == {
            planned[name].removeprefix(PLANNED_SERVER) for name in served
        }


def is_mounted(value: str, *, pod: Manifest) -> bool:
    """Return whether a value is a path below one of the pod's mounts."""
    container = pod["spec"]["containers"][0]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    return any(value == m or value.startswith(f"{m}/") for m in [*mounts, container["terminationMessagePath"]])
