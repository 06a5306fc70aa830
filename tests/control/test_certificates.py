"""The serving certificate: its files, and what is said where they are missing."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from posttrain.control.certificates import CertificateFiles, CertificateMissing, ServingCertificate
from tests.support.certificates import TestAuthority


def test_missing_files_are_named_with_the_way_to_make_them(tmp_path: Path) -> None:
    files = TestAuthority().write(tmp_path)
    files.key.unlink()
    files.authority.write_text("")

    with pytest.raises(CertificateMissing, match=r"no \S+/tls\.key, no \S+/ca\.crt\.\n.*Helm chart") as raised:
        ServingCertificate(files)
    assert raised.value.exit_code == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command, which the message tells to run")
def test_the_commands_of_the_message_make_a_certificate(tmp_path: Path) -> None:
    files = CertificateFiles.in_folder(tmp_path)
    with pytest.raises(CertificateMissing) as raised:
        ServingCertificate(files)
    commands = re.search(r"  openssl .* ca\.crt\n", str(raised.value), re.DOTALL)
    assert commands is not None

    subprocess.run(commands[0], shell=True, check=True, cwd=tmp_path, stderr=subprocess.DEVNULL)

    authority = ServingCertificate(files).authority_text()
    assert len(ssl.create_default_context(cadata=authority).get_ca_certs()) == 1


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    files = TestAuthority().write(tmp_path / "a")
    other = TestAuthority().write(tmp_path / "b")

    with pytest.raises(CertificateMissing, match="no certificate with its key"):
        ServingCertificate(CertificateFiles(certificate=files.certificate, key=other.key, authority=files.authority))


def test_half_of_a_swap_changes_nothing(tmp_path: Path) -> None:
    authority = TestAuthority()
    files = authority.write(tmp_path / "served")
    certificate = ServingCertificate(files)
    new = authority.write(tmp_path / "new")

    shutil.copy(new.certificate, files.certificate)
    assert not certificate.reload_if_changed()
    files.key.unlink()
    assert not certificate.reload_if_changed()
    shutil.copy(new.key, files.key)
    assert certificate.reload_if_changed()
    assert not certificate.reload_if_changed()
