"""A real node: containerd, kubelet, kube-proxy and CoreDNS on a machine of namespaces.

It owns their configuration, and the images that the node has; it must not change anything of this host.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.addresses import answers
from tests.cluster.components import CONTAINERD, COREDNS, NODE, program
from tests.cluster.control_plane import COREDNS as COREDNS_USER
from tests.cluster.control_plane import DNS_ADDRESS, KUBE_PROXY, NODE_NAME, NODE_USER, ControlPlane
from tests.cluster.host_webhooks import apply_objects
from tests.cluster.images import PAUSE, build_base_images
from tests.cluster.machine import Machine
from tests.cluster.processes import START_SECONDS, Process, poll
from tests.cluster.requirements import CNI_FOLDER, find_program

_SOCKET = "/run/containerd/containerd.sock"
_PORTS = {"kubelet": 10250, "kubelet-health": 10248, "proxy-health": 10256, "proxy-metrics": 10249, "dns-health": 8181}


class Node:
    """The node `node-1` of a control plane that is reachable under its machine's host address."""

    def __init__(
        self, machine: Machine, control_plane: ControlPlane, *, container_mounts: Mapping[Path, str] | None = None
    ) -> None:
        self.name = NODE_NAME
        self.machine = machine
        self._control_plane = control_plane
        self._folder = machine.folder
        self._ctr = program(CONTAINERD, "ctr")
        self._container_mounts = container_mounts or {}
        self.containerd = self._build_containerd()
        self.kubelet = self._build_kubelet()
        self.kube_proxy = self._build_kube_proxy()
        self.coredns = self._build_coredns()

    @property
    def processes(self) -> tuple[Process, ...]:
        """Its components, in the order in which they start."""
        return (self.containerd, self.kubelet, self.kube_proxy, self.coredns)

    def start(self) -> None:
        """Start everything, and wait until the node is ready.

        Raises:
            ClusterError: a component did not start; the message has the end of its log.
        """
        self.containerd.start()
        for image in build_base_images():
            self.load_image(image)
        self._apply_dns()
        for process in (self.kubelet, self.kube_proxy, self.coredns):
            process.start(wait=False)
        for process in (self.kubelet, self.kube_proxy, self.coredns):
            process.await_ready()

        def registered() -> str:
            return self._control_plane.kubectl("get", f"node/{self.name}", "--ignore-not-found", "-o", "name")

        poll(registered, what=f"{self.name} to register")
        self._control_plane.kubectl(
            "wait", "--for=condition=Ready", f"node/{self.name}", f"--timeout={START_SECONDS:.0f}s"
        )

    def load_image(self, archive: Path) -> None:
        """Give the node an image from an archive, by its name and by its digest, as if it had been pulled.

        Raises:
            ClusterError: containerd could not read it.
        """
        with tarfile.open(archive) as file:
            index = file.extractfile("manifest.json")
            assert index is not None, f"{archive} is an archive that buildah wrote"
            (tag,) = json.load(index)[0]["RepoTags"]
        by_digest = ("--digests", "--base-name", tag.rpartition(":")[0])
        ctr = (self._ctr, "--address", _SOCKET, "--namespace", "k8s.io")
        self.machine.run(*ctr, "images", "import", *by_digest, archive)

    def advertise(self, resources: Mapping[str, int]) -> None:
        """Let the node say that it has resources which it has not, as `{"nvidia.com/gpu": 2}`."""
        values = {name: str(count) for name, count in resources.items()}
        patch = json.dumps({"status": {"capacity": values, "allocatable": values}})
        self._control_plane.kubectl("patch", "node", self.name, "--subresource=status", "--patch", patch)

    def _build_containerd(self) -> Process:
        binary = program(CONTAINERD, "containerd")
        cni = self._folder / "cni"
        cni.mkdir(parents=True)
        (cni / "10-bridge.conflist").write_text(json.dumps(_cni(self.machine.pod_network)))
        base_spec = self._write_base_spec()
        config = self._folder / "containerd.toml"
        config.write_text(
            _CONTAINERD.format(
                folder=self._folder,
                cni=cni,
                socket=_SOCKET,
                pause=PAUSE,
                plugins=CNI_FOLDER,
                runc=find_program("runc"),
                base_spec=base_spec,
            )
        )

        def ready() -> bool:
            return self.machine.answers(self._ctr, "--address", _SOCKET, "version")

        # The shim is looked for on PATH.
        env = {"PATH": f"{binary.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        return self.machine.process("containerd", [binary, "--config", config], env=env, ready=ready)

    def _write_base_spec(self) -> Path:
        """Write what every container starts from: containerd's own, with this host's folders that all of them see."""
        spec = json.loads(subprocess.run([self._ctr, "oci", "spec"], capture_output=True, check=True).stdout)
        spec["mounts"] += [
            {"destination": inside, "type": "bind", "source": str(folder), "options": ["rbind", "ro"]}
            for folder, inside in self._container_mounts.items()
        ]
        file = self._folder / "container.json"
        file.write_text(json.dumps(spec))
        return file

    def _build_kubelet(self) -> Process:
        resolver = self._folder / "resolv.conf"
        resolver.write_text("nameserver 127.0.0.1\n")
        config = self._folder / "kubelet.json"
        config.write_text(json.dumps(self._kubelet_config(resolver), indent=2))
        argv = [
            program(NODE, "kubelet"),
            f"--config={config}",
            f"--kubeconfig={self._kubeconfig(NODE_USER)}",
            f"--root-dir={self._folder / 'kubelet'}",
            f"--cert-dir={self._folder / 'kubelet-certs'}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.machine.address}",
        ]
        return self.machine.process("kubelet", argv, ready=self._healthy("kubelet-health", "healthz"))

    def _kubelet_config(self, resolver: Path) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.machine.address,
            "port": _PORTS["kubelet"],
            "healthzBindAddress": self.machine.address,
            "healthzPort": _PORTS["kubelet-health"],
            # Whoever has a certificate of the cluster's authority: the API server.
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self._control_plane.pki.files.certificate)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": "cluster.local",
            "resolvConf": str(resolver),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.machine.cgroup}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "nodeStatusUpdateFrequency": "5s",
            # Of a machine that others use, too.
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "volumePluginDir": str(self._folder / "volume-plugins"),
        }

    def _build_kube_proxy(self) -> Process:
        argv = [
            program(NODE, "kube-proxy"),
            f"--kubeconfig={self._kubeconfig(KUBE_PROXY)}",
            f"--hostname-override={self.name}",
            "--proxy-mode=nftables",
            f"--cluster-cidr={self.machine.pod_network}",
            # The system's, not the namespace's.
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
            "--oom-score-adj=0",
            f"--healthz-bind-address={self.machine.address}:{_PORTS['proxy-health']}",
            f"--metrics-bind-address={self.machine.address}:{_PORTS['proxy-metrics']}",
        ]
        return self.machine.process("kube-proxy", argv, ready=self._healthy("proxy-health", "healthz"))

    def _build_coredns(self) -> Process:
        config = self._folder / "Corefile"
        config.write_text(
            _COREFILE.format(
                address=self.machine.address, health=_PORTS["dns-health"], kubeconfig=self._kubeconfig(COREDNS_USER)
            )
        )
        argv = [program(COREDNS, "coredns"), "-conf", config]
        return self.machine.process("coredns", argv, ready=self._healthy("dns-health", "ready"))

    def _apply_dns(self) -> None:
        metadata = {"name": "kube-dns", "namespace": "kube-system"}
        ports = [
            {"name": name, "port": 53, "protocol": protocol} for name, protocol in (("dns", "UDP"), ("dns-tcp", "TCP"))
        ]
        service = {"clusterIP": DNS_ADDRESS, "ports": ports}
        apply_objects(
            self._control_plane,
            [
                {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {**metadata, "labels": {"kubernetes.io/service-name": "kube-dns"}},
                    "addressType": "IPv4",
                    "ports": ports,
                    "endpoints": [{"addresses": [self.machine.address], "conditions": {"ready": True}}],
                },
            ],
        )

    def _kubeconfig(self, user: str) -> Path:
        return self._control_plane.user_kubeconfig(user)

    def _healthy(self, port: str, path: str) -> Callable[[], bool]:
        return answers(f"http://{self.machine.address}:{_PORTS[port]}/{path}")


def _cni(pod_network: str) -> dict[str, Any]:
    addresses = {"type": "host-local", "ranges": [[{"subnet": pod_network}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipMasq": False, "hairpinMode": True}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [{**bridge, "ipam": addresses}, ports]}


_CONTAINERD = """\
version = 3
root = "{folder}/containerd"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{pause}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["{plugins}"]
    conf_dir = "{cni}"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "{base_spec}"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = "{runc}"
      SystemdCgroup = false
"""

_COREFILE = """\
.:53 {{
    bind {address}
    errors
    ready {address}:{health}
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 0
    }}
}}
"""
