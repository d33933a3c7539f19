"""A certificate authority that lives as long as a pool: mutual TLS for scheduler, workers and client."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass, field
from typing import Any

CLOCKS_S = 26 * 3600.0
"""Seconds by which the clock of a machine may differ from the caller's: more than a wrong time zone makes."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM texts for one pool. Keys are kept out of `repr`; who holds them can run code on the pool."""

    ca: str
    certificate: str
    key: str = field(repr=False)

    def security(self) -> Any:
        """Return a `distributed.Security` that refuses unencrypted and unauthenticated peers."""
        from distributed.security import Security

        return Security(
            require_encryption=True,
            tls_ca_file=self.ca,
            **{
                f"tls_{role}_{part}": value
                for role in ("scheduler", "worker", "client")
                for part, value in (("cert", self.certificate), ("key", self.key))
            },
        )


def make_credentials(pool_id: str, *, lifetime_s: float) -> Credentials:
    """Make a fresh authority and one certificate that it signed; the authority's own key is thrown away.

    Parameters
    ----------
    lifetime_s
        Seconds from now for which the certificate is valid; `CLOCKS_S` is added at both ends.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.UTC)
    slack = datetime.timedelta(seconds=CLOCKS_S)
    until = now + datetime.timedelta(seconds=lifetime_s) + slack
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = name(f"skyward {pool_id} authority")
    ca = (
        x509.CertificateBuilder()
        .subject_name(ca_name)
        .issuer_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - slack)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(ca_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name(f"skyward {pool_id}"))
        .issuer_name(ca_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - slack)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    return Credentials(
        ca=ca.public_bytes(serialization.Encoding.PEM).decode(),
        certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode(),
    )
