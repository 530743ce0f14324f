"""TLS on gRPC: certificates read and checked at start, so that a wrong file is named in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import ssl
import stat
from pathlib import Path
from typing import Final

import grpc

from disaggregated.errors import ConfigError

_NO_CERTIFICATE: Final = "tls_cert_file: is missing: a server that speaks TLS has a certificate and its key"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths, as configured; "" where there is none. They are no secrets: a key's file is protected by its mode."""

    cert_file: str = ""
    """PEM: our certificate, and those between it and the authority."""
    key_file: str = ""
    """PEM: its private key."""
    ca_file: str = ""
    """PEM: the authorities that we believe; "": the system's."""
    require_client_cert: bool = False
    """Servers also want a certificate from whoever calls them."""
    server_name: str = ""
    """The name that servers' certificates carry; "": the host that a server is called by."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What of `TlsFiles` both ends of a channel need. The private key is not shown by `repr`."""

    certificate: bytes | None
    private_key: bytes | None = dataclasses.field(repr=False)
    authorities: bytes | None
    require_client_cert: bool
    server_name: str
    files: TlsFiles
    """What it was read from, for those who read by themselves."""

    def server_context(self) -> ssl.SSLContext:
        """As `server_credentials`, for connections that are not gRPC's."""
        if not self.files.cert_file:
            raise ConfigError(_NO_CERTIFICATE)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.files.ca_file or None)
        context.load_cert_chain(self.files.cert_file, self.files.key_file, password=_no_password)
        context.verify_mode = ssl.CERT_REQUIRED if self.require_client_cert else ssl.CERT_NONE
        return context

    def caller_context(self) -> ssl.SSLContext:
        """As `channel_credentials`, for connections that are not gRPC's."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.files.ca_file or None)
        if self.files.cert_file:
            context.load_cert_chain(self.files.cert_file, self.files.key_file, password=_no_password)
        return context

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises ConfigError for a server without a certificate."""
        if self.private_key is None or self.certificate is None:
            raise ConfigError(_NO_CERTIFICATE)
        return grpc.ssl_server_credentials(
            [(self.private_key, self.certificate)],
            root_certificates=self.authorities,
            require_client_auth=self.require_client_cert,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            root_certificates=self.authorities, private_key=self.private_key, certificate_chain=self.certificate
        )

    def channel_options(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


_FLIGHTS: Final = 3
"""Of messages each way; TLS 1.2 has two."""


def load(files: TlsFiles) -> Tls | None:
    """None when nothing is configured. Raises ConfigError that names the key and the file."""
    if files == TlsFiles():
        return None
    if not files.cert_file and not files.ca_file:
        raise ConfigError("tls_cert_file: is missing, and so is tls_ca_file: TLS needs one of the two at least")
    if bool(files.cert_file) != bool(files.key_file):
        missing, there = ("tls_key_file", "tls_cert_file") if files.cert_file else ("tls_cert_file", "tls_key_file")
        raise ConfigError(f"{missing}: is missing; {there} needs it")
    if files.require_client_cert and not files.ca_file:
        raise ConfigError("tls_ca_file: is missing; it says whose certificates tls_require_client_cert accepts")
    certificate, key = _read("tls_cert_file", files.cert_file), _read("tls_key_file", files.key_file)
    authorities = _read("tls_ca_file", files.ca_file)
    _check(files)
    return Tls(
        certificate=certificate,
        private_key=key,
        authorities=authorities,
        require_client_cert=files.require_client_cert,
        server_name=files.server_name,
        files=files,
    )


def _read(key: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from error


def _check(files: TlsFiles) -> None:
    """gRPC tells only at the first connection, and only in its own log, what is wrong with a certificate."""
    if files.cert_file:
        server_context(files.cert_file, files.key_file)
    if files.ca_file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.ca_file)
        except ssl.SSLError as error:
            raise ConfigError(f"tls_ca_file: {files.ca_file}: {_said(error)}") from error


def server_context(
    cert_file: str, key_file: str, *, cert_name: str = "tls_cert_file", key_name: str = "tls_key_file"
) -> ssl.SSLContext:
    """Of a server with this certificate. Raises ConfigError that names the configured key and the file."""
    _check_private(key_file, key_name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except OSError as error:
        if not isinstance(error, ssl.SSLError):
            raise ConfigError(f"{cert_name}: {cert_file}: {error.strerror}") from error
        raise ConfigError(f"{cert_name}: {cert_file} with {key_name} {key_file}: {_said(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{cert_name}: {cert_file} with {key_name} {key_file}: {error}") from error
    return context


def why_not_believed(cert_file: str, key_file: str) -> str:
    """What a client that trusts this very certificate says against it, such as "certificate has expired"; "" when
    nothing. Shakes hands with ourselves in memory: the standard library reads certificates no other way.

    Raises ConfigError as `server_context` does.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        server_context(cert_file, key_file).wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server),
    )
    try:
        for _ in range(_FLIGHTS):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return ""


def _check_private(path: str, name: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from error
    if mode & stat.S_IRWXO:
        raise ConfigError(f"{name}: {path}: others than its owner may use it; chmod 600 {path}")


def _no_password() -> str:
    raise ValueError("the key is encrypted; a server cannot ask for its password")


def _said(error: Exception) -> str:
    reasons = {
        "KEY_VALUES_MISMATCH": "the key does not belong to the certificate",
        "NO_START_LINE": "there is no PEM certificate, or no key, in it",
        "NO_CERTIFICATE_OR_CRL_FOUND": "there is no PEM certificate in it",
        "PEM_LIB": "one of the two is not PEM",
    }
    reason = getattr(error, "reason", None)
    return reasons.get(reason or "", str(error))
