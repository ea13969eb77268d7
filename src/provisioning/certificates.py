"""The federation's certificates: one authority, and a certificate with a SPIFFE identity for every node and person.

EC P-256 with SHA-256 (RFC 5480; NIST SP 800-57 gives it 128-bit security). The identity is a URI in the subject
alternative name, `spiffe://<federation>/<role>/<name>`: servers and clients read it from there and nowhere else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS: Final = 825
"""The longest that Apple's platforms accept from a private authority (HT210176), which is why people expect it."""
BACKDATED: Final = timedelta(hours=1)
"""Clocks of the machines that get the kits may be behind."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its private key, as PEM. `key_pem` is secret and not shown by `repr`."""

    pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"Certificate({len(self.pem)} bytes of PEM)"


class Authority:
    """A certificate authority that lives as long as one provisioning, and longer in the operator's kit."""

    def __init__(self, federation: str, *, now: datetime | None = None) -> None:
        self._federation = federation
        self._now = now or datetime.now(UTC)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(federation, f"Sotto federation {federation}")
        public = self._key.public_key()
        self._certificate = (
            _builder(self._name, public, issuer=self._name, now=self._now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def certificate(self) -> Certificate:
        """The authority's own certificate and key."""
        return Certificate(self._certificate.public_bytes(Encoding.PEM), _key_pem(self._key))

    def server(self, name: str, *, hosts: Sequence[str]) -> Certificate:
        """A server certificate for a role of its own name (the aggregator).

        Args:
            name: of the role, and in it.
            hosts: DNS names and IP addresses that clients will dial; localhost and 127.0.0.1 are added.
        """
        names = list(dict.fromkeys(_general_name(host) for host in ("localhost", "127.0.0.1", *hosts)))
        return self._issue(name, name, names, purpose=ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self, role: str, name: str) -> Certificate:
        """A client certificate for a party, scientist or operator."""
        return self._issue(role, name, [], purpose=ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self, role: str, name: str, names: Sequence[x509.GeneralName], *, purpose: x509.ObjectIdentifier
    ) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        identity = x509.UniformResourceIdentifier(f"spiffe://{self._federation}/{role}/{name}")
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _builder(_name(self._federation, name), public, issuer=self._name, now=self._now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName([identity, *names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(certificate.public_bytes(Encoding.PEM), _key_pem(key))


def _name(federation: str, common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host.encode("idna").decode())


def _builder(
    subject: x509.Name, public: ec.EllipticCurvePublicKey, *, issuer: x509.Name, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now - BACKDATED + timedelta(days=VALID_DAYS))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
