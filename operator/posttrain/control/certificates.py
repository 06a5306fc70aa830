"""The progress server's certificate: where it lies, and the TLS that is made of it.

It owns the files and their renewal; it must not make a certificate, nor fall back to plain HTTP without one.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path

import structlog

from posttrain.errors import UserError

log = structlog.get_logger(__name__)

_CHECK_SECONDS = 10.0

_HOW_TO_MAKE = """\
The Helm chart makes a Secret with tls.crt, tls.key and ca.crt and mounts it. By hand, in the folder of the files:

  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \\
    -subj /CN=posttrain-progress -addext subjectAltName=DNS:posttrain-progress.posttrain-system.svc \\
    -keyout tls.key -out tls.crt
  cp tls.crt ca.crt

The name in subjectAltName must be that of progressServer.url in the settings."""


class CertificateMissing(UserError):
    """There is no certificate to serve with; the message says how to make one."""


@dataclass(frozen=True, kw_only=True)
class CertificateFiles:
    """Three PEM files; the authority is what pods check the certificate against."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def in_folder(cls, folder: Path) -> CertificateFiles:
        """Return the files of a mounted Secret of type kubernetes.io/tls, as Helm and cert-manager write it."""
        return cls(certificate=folder / "tls.crt", key=folder / "tls.key", authority=folder / "ca.crt")

    def check(self) -> None:
        """Look whether the files are there.

        Raises:
            CertificateMissing: one is not, or is empty.
        """
        missing = [str(path) for path in (self.certificate, self.key, self.authority) if not _has_content(path)]
        if missing:
            raise CertificateMissing(
                f"the progress server needs a certificate, since pods send their tokens to it, and there is no "
                f"{', no '.join(missing)}.\n{_HOW_TO_MAKE}"
            )


class ServingCertificate:
    """The TLS context of new connections; it follows the files, which Kubernetes swaps while the process runs."""

    def __init__(self, files: CertificateFiles) -> None:
        """Load the files.

        Raises:
            CertificateMissing: a file is missing, or they do not belong together.
        """
        files.check()
        self._files = files
        self._loaded = self._stamp()
        try:
            self.context = self._load()
        except (OSError, ssl.SSLError) as error:
            raise CertificateMissing(
                f"{files.certificate} and {files.key} are no certificate with its key: {error}.\n{_HOW_TO_MAKE}"
            ) from error

    def authority_text(self) -> str:
        """Return the authority's certificates as they stand in the file.

        Raises:
            OSError: the file cannot be read.
        """
        return self._files.authority.read_text()

    def reload_if_changed(self) -> bool:
        """Serve new connections with the files if they changed; tell whether it did so.

        Half of a swap leaves the old certificate in place, and the next look takes the whole.
        """
        try:
            stamp = self._stamp()
            if stamp == self._loaded:
                return False
            self._load()  # into a context of its own first: a failed load would spoil the one that serves
            self.context.load_cert_chain(self._files.certificate, self._files.key)
        except (OSError, ssl.SSLError) as error:
            log.warning("the progress server goes on with its old certificate", error=str(error))
            return False
        self._loaded = stamp
        log.info("the progress server serves with a new certificate")
        return True

    async def follow(self) -> None:
        """Look after the files again and again, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self.reload_if_changed()

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._files.certificate, self._files.key)
        return context

    def _stamp(self) -> tuple[bytes, bytes]:
        # The content, since a swapped symbolic link may lead to a file of the same age and size.
        return self._files.certificate.read_bytes(), self._files.key.read_bytes()


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
