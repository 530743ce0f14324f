"""Names for calls, by which a later message says which one it answers."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

NewCallId = Callable[[], str]

_ALPHANUMERIC = string.ascii_letters + string.digits


def openai_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def mistral_call_id() -> str:
    """Mistral's templates refuse any other length."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
