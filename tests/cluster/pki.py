"""The certificates of a test cluster: one authority, and what it signs.

It owns keys and certificates as files; it must not know who serves with them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The certificate rotators of the training operator and of Kueue replace what ends within 90 days, and an authority
# without these names in it.
_LIFETIME = timedelta(days=365)
_AUTHORITY_NAMES = ("training-operator-ca", "kueue-ca")


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for a cluster's servers, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # RSA, and PKCS#1 on disk: the rotators read no other.
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "posttrain-test-cluster")])
        certificate = (
            _builder(self._name, issuer=self._name, public_key=self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectAlternativeName(list(map(x509.DNSName, _AUTHORITY_NAMES))), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.files = KeyPair(folder / "ca.crt", folder / "ca.key")
        _write(self.files.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        _write(self.files.key, _pem(self._key, serialization.PrivateFormat.TraditionalOpenSSL))

    @property
    def bundle(self) -> str:
        """The certificate as a `caBundle` holds it."""
        return base64.b64encode(self.files.certificate.read_bytes()).decode()

    def issue(self, name: str, *, hosts: Iterable[str] = (), groups: Iterable[str] = ()) -> KeyPair:
        """Sign a certificate for serving under these names and addresses, and for a user in these groups."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(subject, issuer=self._name, public_key=key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if names := [_general_name(host) for host in hosts]:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        base = self._folder / name.replace(":", "-")
        pair = KeyPair(base.with_name(f"{base.name}.crt"), base.with_name(f"{base.name}.key"))
        _write(pair.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        _write(pair.key, _pem(key, serialization.PrivateFormat.PKCS8))
        return pair


def write_signing_key(folder: Path) -> KeyPair:
    """Write a key for service account tokens; its public half takes the certificate's place."""
    key = ec.generate_private_key(ec.SECP256R1())
    pair = KeyPair(folder / "service-accounts.pub", folder / "service-accounts.key")
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write(pair.certificate, public)
    _write(pair.key, _pem(key, serialization.PrivateFormat.PKCS8))
    return pair


def _builder(
    subject: x509.Name, *, issuer: x509.Name, public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(file: Path, content: bytes) -> None:
    file.touch(mode=0o600)
    file.write_bytes(content)
