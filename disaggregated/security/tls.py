"""TLS on gRPC: certificates read and checked at start, so that a wrong file is named in one line."""

from __future__ import annotations

import dataclasses

import grpc

from disaggregated.errors import ConfigError


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

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises ConfigError for a server without a certificate."""
        if self.private_key is None or self.certificate is None:
            raise ConfigError("tls_cert_file: is missing: a server that speaks TLS has a certificate and its key")
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


def load(files: TlsFiles) -> Tls | None:
    """None when nothing is configured. Raises ConfigError that names the key and the file."""
    raise NotImplementedError
