"""TLS files, and where plaintext is allowed: nowhere but on the machine's own loopback."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..errors import ConfigError
from .validity import out_of_time


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one end of mutual TLS.

    Attributes:
        certificate: this end's certificate (chain); its URI SAN says who it is.
        key: its private key, not encrypted.
        ca: the federation's certificate authority, which vouches for the other end.
    """

    certificate: Path
    key: Path
    ca: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key and CA as PEM, checked as far as one end can: gRPC itself would only fail to connect.

        Raises:
            ConfigError: a file is missing or is not what it should be, the key is not the certificate's, or a
                certificate does not hold (any more, or yet) by this machine's clock.
        """
        certificate = _read("certificate", self.certificate)
        key = _read("key", self.key)
        ca = _read("ca", self.ca)
        problems = [
            f"tls.{name}: holds no PEM certificate"
            for name, pem in (("certificate", certificate), ("ca", ca))
            if not _holds_certificates(pem)
        ]
        try:
            # An empty password opens no encrypted key; without one OpenSSL would ask for it on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                problems.append("tls.key: is not the key of tls.certificate")
            elif not problems or problems[0].startswith("tls.ca"):
                problems.append("tls.key: holds no unencrypted PEM private key")
        if not problems:
            said = (("certificate", out_of_time(certificate)), ("ca", out_of_time(ca)))
            problems = [f"tls.{name}: {text}" for name, text in said if text]
        if problems:
            raise ConfigError("the TLS files cannot be used: " + "; ".join(problems), problems=tuple(problems))
        return certificate, key, ca


def _holds_certificates(pem: bytes) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        return False
    return True


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        problem = f"tls.{name}: {path}: {error.strerror}"
        raise ConfigError(f"the TLS files cannot be used: {problem}", problems=(problem,)) from error


def client_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """For a client that shows its certificate and accepts servers of its CA only."""
    certificate, key, ca = files.read()
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=certificate)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For a server that accepts nobody without a certificate of its CA."""
    certificate, key, ca = files.read()
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)


def check_transport(setting: str, address: str, *, tls: TlsFiles | None, insecure: bool) -> None:
    """Refuses everything but TLS, or plaintext that was asked for and stays on this machine.

    Args:
        setting: the path of the address in the configuration, for the message.
        address: "host:port".

    Raises:
        ConfigError: says which rule is broken.
    """
    problem = ""
    if insecure and tls is not None:
        problem = "insecure: true and tls exclude each other"
    elif insecure and not is_loopback(address):
        problem = f"{setting}: {address}: insecure: true is allowed on loopback addresses only"
    elif not insecure and tls is None:
        problem = "tls: certificate, key and ca are needed (or insecure: true on a loopback address)"
    if problem:
        raise ConfigError(problem, problems=(problem,))


def is_loopback(address: str) -> bool:
    """Whether "host:port" can only be reached from this machine. Host names other than localhost are not looked up."""
    if ":" not in address:
        return False
    host = host_of(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """The host of "host:port", an IPv6 address without its brackets."""
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")
