"""Every error that crosses a room's wall.

    DisaggregatedError
    ├── InvalidRequest (ValueError)       the client's: 4xx, names the field and the limit
    │   ├── UnknownModel                  404
    │   ├── GrammarRefused                it cannot be compiled
    │   ├── UnknownResponse               404
    │   ├── UnknownPreviousResponse
    │   ├── PromptTooLong
    │   ├── InvalidApiKey                 401
    │   ├── NotAllowed                    403, the key is good for something else
    │   └── QuotaExceeded                 429, the key's share of this minute is used up
    ├── StartupError                      a process cannot start: exit code and one message
    │   ├── ConfigError (ValueError)      the operator's file or flags
    │   ├── PortTaken
    │   ├── ModelUnavailable              missing, damaged, unsupported, not downloadable
    │   └── NotEnoughMemory
    ├── AdmissionError                    refused before any work was done; nothing has to be undone
    │   ├── PoolExhausted
    │   ├── QueueFull
    │   ├── Overloaded
    │   └── Draining
    ├── Unauthenticated                   the two ends do not know the same cluster secret
    ├── ServerLost                        crashed, frozen, or its connection broke
    ├── NoServerAvailable                 no server of the role for as long as we may wait
    ├── DeadlineExceeded                  the request's own deadline
    ├── RequestCancelled                  somebody asked for it
    ├── GrammarBroken                     what one server generated is not what another one reads the grammar to allow
    └── TransferError                     KV did not land; nothing was admitted
        ├── LayoutMismatch
        ├── FingerprintMismatch
        ├── WrongSecret
        ├── StaleEpoch
        ├── LeaseExpired
        ├── ChecksumMismatch
        ├── PeerLost
        ├── SourceFailed
        └── TransferTimeout

HTTP status and retry are decided from the class attributes here, in one place each.
What is *our* mistake is an `assert`, and crashes the process.
"""

from __future__ import annotations

from typing import ClassVar


class DisaggregatedError(Exception):
    """Something that a reader of logs, or a client, is told in one sentence."""

    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    """Another server, or the same one later, may well succeed."""
    retry_after_s: int | None = None
    """Whole seconds after which the client may hope for another answer, where whoever raises this knows it."""


class InvalidRequest(DisaggregatedError, ValueError):
    """The client's mistake. `param` is the field's name as the client wrote it."""

    http_status = 400
    openai_type = "invalid_request_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(InvalidRequest):
    http_status = 404
    code = "model_not_found"


class UnknownResponse(InvalidRequest):
    """Nobody keeps it, or it is somebody else's."""

    http_status = 404
    code = "response_not_found"


class UnknownPreviousResponse(InvalidRequest):
    code = "previous_response_not_found"


class GrammarRefused(InvalidRequest):
    """In the words of the library that was to compile it; another one may."""


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class InvalidApiKey(InvalidRequest):
    http_status = 401
    code = "invalid_api_key"


class NotAllowed(InvalidRequest):
    http_status = 403
    openai_type = "permission_error"
    code = "not_allowed"


class QuotaExceeded(InvalidRequest):
    http_status = 429
    openai_type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class StartupError(DisaggregatedError):
    exit_code: ClassVar[int] = 1


class ConfigError(StartupError, ValueError):
    """`path` is where in the file: `generation_servers.num_instances`."""

    exit_code = 2


class PortTaken(StartupError):
    exit_code = 3


class ModelUnavailable(StartupError):
    exit_code = 4


class NotEnoughMemory(StartupError):
    exit_code = 5


class AdmissionError(DisaggregatedError):
    http_status = 503
    openai_type = "overloaded_error"
    retryable = True


class PoolExhausted(AdmissionError):
    @classmethod
    def of(cls, *, wanted: int, free: int) -> PoolExhausted:
        return cls(f"wanted {wanted} KV blocks, {free} are free")


class QueueFull(AdmissionError):
    """Too many wait already: in the orchestrator, which tells the client, or in one server, while another has room."""

    http_status = 429


class Overloaded(AdmissionError):
    """What the client asked for by when cannot be kept at the present load."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(AdmissionError):
    """The server is finishing what it has and takes nothing new."""


class Unauthenticated(DisaggregatedError):
    """Refused before anything was read; says what to set, and where."""

    http_status = 502


class ServerLost(DisaggregatedError):
    http_status = 502
    retryable = True


class NoServerAvailable(DisaggregatedError):
    http_status = 503
    openai_type = "overloaded_error"


class DeadlineExceeded(DisaggregatedError):
    http_status = 504
    openai_type = "timeout_error"


class RequestCancelled(DisaggregatedError):
    http_status = 499


class GrammarBroken(DisaggregatedError):
    """Libraries of two servers disagree about a text in the middle of it."""


class TransferError(DisaggregatedError):
    retryable = True


class LayoutMismatch(TransferError):
    """The two ends disagree on KVLayout and no conversion exists; nothing was read."""

    retryable = False


class FingerprintMismatch(TransferError):
    """The two ends serve different weights, or the same ones under other numerics."""

    retryable = False


class WrongSecret(TransferError):
    """One end of a link could not prove that it knows the cluster's secret; nothing was read."""

    retryable = False


class StaleEpoch(TransferError):
    """The source process that made the promise is gone; another one answers at its address."""


class LeaseExpired(TransferError):
    """The source gave the blocks back before the read was confirmed."""


class ChecksumMismatch(TransferError):
    """Bytes arrived that are not the bytes that were published."""


class PeerLost(TransferError):
    """The link to the source broke."""


class SourceFailed(TransferError):
    """The prefill behind this transfer failed or was cancelled."""


class TransferTimeout(TransferError):
    """No publication, or no bytes, within the deadline."""
