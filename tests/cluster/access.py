"""The way to one API server: kubectl, and a kubeconfig for each of its users.

It owns what is asked and with whose credentials; it must not know who started the server.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.components import KUBERNETES, program
from tests.cluster.errors import ClusterError
from tests.cluster.processes import poll

_NAME = "posttrain-test"
_KUBECTL_SECONDS = 120.0


class Access:
    """An API server as a user of it; kubeconfigs lie in a folder.

    `server` and `credentials` are what a kubeconfig says of a cluster and of a user.
    """

    def __init__(
        self,
        folder: Path,
        *,
        server: Mapping[str, Any],
        user: str,
        credentials: Mapping[str, Any],
        environ: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self._server = server
        self._environ = environ
        self._kubectl = program(KUBERNETES, "kubectl")
        self.kubeconfig = self.write_kubeconfig(user, credentials=credentials)

    def kubectl(self, *args: str | Path, input: str | None = None, kubeconfig: Path | None = None) -> str:
        """Run kubectl, as the user unless a kubeconfig is given, and return what it prints.

        Raises:
            ClusterError: it failed; the message has what it wrote on standard error.
        """
        options = ("--kubeconfig", kubeconfig or self.kubeconfig, "--cache-dir", self.folder / "kubectl-cache")
        argv = [self._kubectl, *options, *args]
        return _run(argv, what=f"kubectl {' '.join(map(str, args))}", input=input, environ=self._environ)

    def await_namespace(self, namespace: str) -> None:
        """Wait until a namespace takes pods: it has its default ServiceAccount and the authority's certificate."""

        def look() -> bool:
            account = self.kubectl("get", "serviceaccount/default", "-n", namespace, "--ignore-not-found", "-o", "name")
            certificate = self.kubectl(
                "get", "configmap/kube-root-ca.crt", "-n", namespace, "--ignore-not-found", "-o", "name"
            )
            return bool(account and certificate)

        poll(look, what=f"the default ServiceAccount of {namespace}")

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """Return a kubeconfig with a token of a ServiceAccount, which is as long valid as a test session lasts.

        Raises:
            ClusterError: there is no such ServiceAccount.
        """
        token = self.kubectl("create", "token", name, "--namespace", namespace, "--duration", "24h").strip()
        return self.write_kubeconfig(f"{namespace}.{name}", credentials={"token": token})

    def write_kubeconfig(self, user: str, *, credentials: Mapping[str, Any]) -> Path:
        """Write a kubeconfig with everything in it; return where it lies."""
        file = self.folder / "kubeconfigs" / user.replace(":", "-")
        file.parent.mkdir(exist_ok=True)
        file.touch(mode=0o600)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": _NAME, "cluster": dict(self._server)}],
            "users": [{"name": user, "user": dict(credentials)}],
            "contexts": [{"name": _NAME, "context": {"cluster": _NAME, "user": user}}],
            "current-context": _NAME,
        }
        file.write_text(json.dumps(config, indent=2))
        return file


def read_access(kubeconfig: Path, *, folder: Path) -> Access:
    """Return the way that the current context of somebody's kubeconfig leads.

    Raises:
        ClusterError: kubectl does not read it; the message has what it wrote on standard error.
    """
    view = ("config", "view", "--raw", "--minify", "--flatten", "--output=json", f"--kubeconfig={kubeconfig}")
    argv = [program(KUBERNETES, "kubectl"), *view]
    config = json.loads(_run(argv, what=f"kubectl {' '.join(view)}", environ=os.environ))
    (server,), (user,) = config["clusters"], config["users"]
    folder.mkdir(parents=True, exist_ok=True)
    return Access(folder, server=server["cluster"], user=user["name"], credentials=user["user"], environ=os.environ)


def _run(argv: Sequence[str | Path], *, what: str, environ: Mapping[str, str], input: str | None = None) -> str:
    try:
        ran = subprocess.run(
            list(map(str, argv)),
            input=input,
            env=environ,
            capture_output=True,
            text=True,
            timeout=_KUBECTL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{what}: no end within {_KUBECTL_SECONDS:.0f} s") from error
    if ran.returncode != 0:
        raise ClusterError(f"{what}: exit code {ran.returncode}\n{ran.stderr}{ran.stdout}")
    return ran.stdout
