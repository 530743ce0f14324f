"""What a process is told about who belongs to its deployment. See docs/security.md."""

from __future__ import annotations

import dataclasses

from disaggregated.security.tls import TlsFiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    cluster_secret_file: str = ""
    """Path of the file that holds the secret; "": it is in the environment, or there is none."""
    internal_request_auth_key: str = dataclasses.field(default="", repr=False)
    """The secret itself, where somebody wrote it into the deployment file. Never on a command line."""
    tls: TlsFiles = TlsFiles()
