"""What an operator is told about the secret of this machine, before anything is started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from disaggregated.errors import ConfigError
from disaggregated.security.secret import FILE_KEY, VARIABLE, find


@dataclasses.dataclass(frozen=True, slots=True)
class SecretStatus:
    is_usable: bool
    """False: a process that is started like this refuses to start."""
    is_set: bool
    says: str


def secret_status(environ: Mapping[str, str] = os.environ) -> SecretStatus:
    """Of the environment, which is all that a command without a configuration file has."""
    try:
        secret = find(environ, file=environ.get("DISAGG__CLUSTER_SECRET_FILE", ""))
    except ConfigError as error:
        return SecretStatus(is_usable=False, is_set=True, says=str(error))
    if secret.is_open:
        says = f"none in the environment; servers started by hand listen on loopback only, unless {FILE_KEY} names one"
        return SecretStatus(is_usable=True, is_set=False, says=says)
    where = VARIABLE if environ.get(VARIABLE) else f"{FILE_KEY}: {environ['DISAGG__CLUSTER_SECRET_FILE']}"
    return SecretStatus(is_usable=True, is_set=True, says=f"set by {where}")
