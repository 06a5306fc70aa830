"""etcd, API server, controller manager and scheduler as processes of this machine.

It owns their flags and the users with a token; it must not know what runs in the cluster.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cluster.access import Access
from tests.cluster.addresses import LOOPBACK, Ports, answers
from tests.cluster.components import ETCD, KUBERNETES, program
from tests.cluster.pki import Authority, write_signing_key
from tests.cluster.processes import Process

SERVICE_NETWORK = "10.96.0.0/24"
SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
NODE_NAME = "node-1"
ADMIN = "admin"
CONTROLLER_MANAGER = "system:kube-controller-manager"
SCHEDULER = "system:kube-scheduler"
KWOK = "kwok"
KUBE_PROXY = "system:kube-proxy"
NODE_USER = f"system:node:{NODE_NAME}"
COREDNS = "coredns"
# User to groups. Everybody else gets a token of their ServiceAccount, so that their own RBAC is in force.
_USERS: Mapping[str, str] = {
    ADMIN: "system:masters",
    KWOK: "system:masters",
    CONTROLLER_MANAGER: "",
    SCHEDULER: "",
    KUBE_PROXY: "",
    NODE_USER: "system:nodes",
    COREDNS: "system:masters",
}
_AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


class ControlPlane(Access):
    """A control plane in a folder, reachable under one address."""

    def __init__(self, folder: Path, *, ports: Ports, host: str = LOOPBACK) -> None:
        self.host = host
        self.ports = ports
        self.pki = Authority(folder / "pki")
        self.tokens = {user: secrets.token_urlsafe(32) for user in _USERS}
        self.port = ports.take()
        self.url = f"https://{host}:{self.port}"
        super().__init__(
            folder,
            server={"server": self.url, "certificate-authority-data": self.pki.bundle},
            user=ADMIN,
            credentials={"token": self.tokens[ADMIN]},
            # A proxy of this machine's does not know the cluster.
            environ={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        )
        self.audit_log = folder / "audit.log"
        self.etcd = self._build_etcd()
        self.api_server = self._build_api_server()
        self.controller_manager = self._build_controller("kube-controller-manager", CONTROLLER_MANAGER, *self._kcm())
        self.scheduler = self._build_controller("kube-scheduler", SCHEDULER)

    @property
    def processes(self) -> tuple[Process, ...]:
        """Its components, in the order in which they start."""
        return (self.etcd, self.api_server, self.controller_manager, self.scheduler)

    def start_api(self) -> None:
        """Start what takes objects, and wait until it does.

        Raises:
            ClusterError: a component did not start; the message has the end of its log.
        """
        self.etcd.start(wait=False)
        self.api_server.start(wait=False)
        self.api_server.await_ready()

    def start_controllers(self) -> None:
        """Start what acts on objects, and wait until a pod could be created.

        The garbage collector looks for new kinds twice a minute: what is owned by a kind that came after it stays for
        as long, or twice as long, when its owner is deleted.

        Raises:
            ClusterError: a component did not start; the message has the end of its log.
        """
        with ThreadPoolExecutor() as pool:
            list(pool.map(Process.start, (self.controller_manager, self.scheduler)))
        self.await_namespace("default")

    def user_kubeconfig(self, user: str) -> Path:
        """Return a kubeconfig of one of the users with a token."""
        return self.write_kubeconfig(user, credentials={"token": self.tokens[user]})

    def audit(self) -> Iterator[dict[str, Any]]:
        """Yield every request that the API server answered so far: an audit event each, oldest first."""
        with self.audit_log.open(encoding="utf-8") as lines:
            for line in lines:
                # The last line may be half written.
                if line.endswith("\n"):
                    yield json.loads(line)

    def _build_etcd(self) -> Process:
        client, peer = (f"http://{LOOPBACK}:{self.ports.take()}" for _ in range(2))
        self._etcd_url = client
        argv = [
            program(ETCD, "etcd"),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",  # nothing here outlives the machine
            "--log-level=warn",
        ]
        return Process("etcd", argv, folder=self.folder, ready=answers(f"{client}/readyz"))

    def _build_api_server(self) -> Process:
        hosts = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
        serving = self.pki.issue("kube-apiserver", hosts=["localhost", LOOPBACK, SERVICE_ADDRESS, self.host, *hosts])
        kubelet_client = self.pki.issue("kube-apiserver-kubelet-client", groups=["system:masters"])
        accounts = write_signing_key(self.folder / "pki")
        tokens = self.folder / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text("".join(f'{self.tokens[user]},{user},{user},"{group}"\n' for user, group in _USERS.items()))
        policy = self.folder / "audit-policy.yaml"
        policy.write_text(_AUDIT_POLICY)
        argv = [
            program(KUBERNETES, "kube-apiserver"),
            f"--etcd-servers={self._etcd_url}",
            f"--bind-address={self.host}",
            f"--advertise-address={self.host}",
            f"--secure-port={self.port}",
            # A loopback address may not stand in an EndpointSlice.
            f"--endpoint-reconciler-type={'none' if self.host == LOOPBACK else 'lease'}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--cert-dir={self.folder / 'api-server-certs'}",
            f"--client-ca-file={self.pki.files.certificate}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=Node,RBAC",
            f"--service-account-key-file={accounts.certificate}",
            f"--service-account-signing-key-file={accounts.key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",
            "--enable-aggregator-routing=true",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.folder / 'audit.log'}",
            "--audit-log-mode=blocking",  # an event stands there when the request is answered
            "--audit-log-maxsize=4096",
        ]
        ready = answers(f"{self.url}/readyz", ca=self.pki.files.certificate, token=self.tokens[ADMIN])
        return Process("kube-apiserver", argv, folder=self.folder, ready=ready)

    def _kcm(self) -> list[str]:
        return [
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self.folder / 'pki' / 'service-accounts.key'}",
            f"--root-ca-file={self.pki.files.certificate}",
            # The defaults are for many controllers on a shared API server; here they would be what is measured.
            "--concurrent-gc-syncs=20",
        ]

    def _build_controller(self, name: str, user: str, *flags: str) -> Process:
        port = self.ports.take()
        kubeconfig = self.user_kubeconfig(user)
        argv = [
            program(KUBERNETES, name),
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--leader-elect=false",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={port}",
            f"--cert-dir={self.folder / f'{name}-certs'}",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            *flags,
        ]
        return Process(name, argv, folder=self.folder, ready=answers(f"https://{LOOPBACK}:{port}/healthz"))
