"""The keys that say who belongs to a deployment: of a deployment file, of a server's own file and of its flags."""

from __future__ import annotations

from typing import Final

from disaggregated.config.key_table import Key, honoured
from disaggregated.config.kinds import BOOLEAN, TEXT, BadValue, Kind


def _check_secret(value: object) -> object:
    """Like TEXT, but no message ever shows the value."""
    if not isinstance(value, str):
        raise BadValue("must be text, in quotes where it has only digits")
    return value


SECRET: Final = Kind("text", _check_secret, is_text=True)

COMMON: Final[tuple[Key, ...]] = (
    honoured(
        "cluster_secret_file",
        TEXT,
        "File with the secret that all processes of the deployment share. Without one, the launcher makes a secret for "
        "the servers that it starts, and servers started by hand listen on loopback only.",
        target="security.cluster_secret_file",
    ),
    honoured(
        "tls_cert_file", TEXT, "PEM certificate of this process; with it gRPC is TLS.", target="security.tls.cert_file"
    ),
    honoured("tls_key_file", TEXT, "PEM private key of tls_cert_file.", target="security.tls.key_file"),
    honoured(
        "tls_ca_file",
        TEXT,
        "PEM certificates of the authorities that servers are believed by.",
        target="security.tls.ca_file",
    ),
    honoured(
        "tls_require_client_cert",
        BOOLEAN,
        "Servers serve only callers with a certificate of tls_ca_file, too.",
        target="security.tls.require_client_cert",
    ),
    honoured(
        "tls_server_name",
        TEXT,
        "Name that the servers' certificates carry; left out: the host that a server is called by.",
        target="security.tls.server_name",
    ),
)
"""What a process of any kind may be told."""

DEPLOYMENT: Final[tuple[Key, ...]] = (
    *COMMON,
    honoured(
        "internal_request_auth_key",
        SECRET,
        "The secret itself. Prefer cluster_secret_file: then this file may be read by others.",
        target="security.internal_request_auth_key",
    ),
)
