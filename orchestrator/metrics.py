"""What Prometheus reads. Requests are counted as they end; servers are looked at when somebody reads.

Names end in their unit. Labels are role, instance, outcome, reason and transport, which all have few values; never a
request id. The counters without our prefix are TensorRT-LLM's, so that its dashboards keep working.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disaggregated import logs
from disaggregated.errors import DisaggregatedError
from disaggregated.request_life import Phase
from orchestrator.admission.ticket import NO_OBJECTIVES
from orchestrator.counting import Counter, Histogram
from orchestrator.routing.scorecard import Scorecard
from orchestrator.server import Server
from orchestrator.story import AttemptStory, RequestStory

if TYPE_CHECKING:
    from orchestrator.dispatch import Dispatcher

log = logs.get(__name__)

Family = GaugeMetricFamily | CounterMetricFamily
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
UNCOUNTED_MAX: Final = 128
"""Requests that have ended; they are counted when somebody reads, or when there are so many."""
_SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 180.0)
_LAG_SECONDS: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SHORT_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Implements `dispatch.RequestObserver`. Nothing here is touched for a token, only for a request."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self._registry = registry = CollectorRegistry()
        self._servers = servers

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self._requests = counter("disagg_requests_total", "Sequences that ended, by outcome.", "outcome")
        self._attempts_failed = counter(
            "disagg_attempts_failed_total",
            "Attempts that came to nothing, by the error; most went on elsewhere.",
            "reason",
        )
        self._errors = counter("disagg_errors_answered_total", "Errors that a client saw, by HTTP status.", "status")
        self._prompt_tokens = counter("disagg_prompt_tokens_total", "Tokens of prompts that were prefilled.")
        self._cached_tokens = counter("disagg_prompt_cached_tokens_total", "Of these, found in a prefix cache.")
        self._tokens = counter("disagg_generation_tokens_total", "Tokens that were generated.")
        self._bytes = counter("disagg_kv_transferred_bytes_total", "KV that moved, by transport.", "transport")
        self._saved_bytes = counter(
            "disagg_kv_saved_bytes_total", "KV that did not move, because the generation server had it."
        )
        self._pulled_tokens = counter(
            "disagg_prompt_pulled_tokens_total", "Tokens of prompts whose KV was brought from a generation server."
        )
        self._pulled_bytes = counter("disagg_kv_pulled_bytes_total", "KV brought from generation servers.")
        self._declined_tokens = counter(
            "disagg_prompt_declined_tokens_total",
            "Tokens of prompts that a generation server held, and that were computed because that was cheaper.",
        )
        self._hints = counter(
            "disagg_prefix_hints_total", "What became of hints who holds a prompt's beginning.", "verdict"
        )
        self._reuse = histogram(
            "disagg_prefix_reuse_seconds", "Spent on a hint: deciding, and bringing if it was worth it.", _SHORT_SECONDS
        )
        self._ttft = histogram("disagg_ttft_seconds", "Arrival to first token.")
        self._tpot = histogram("disagg_tpot_seconds", "Mean gap between tokens of a sequence.", _SHORT_SECONDS)
        self._gap = histogram("disagg_longest_gap_seconds", "Longest gap between two tokens of a sequence.")
        self._e2e = histogram("disagg_e2e_seconds", "Arrival to last token.")
        self._objectives = counter(
            "disagg_slo_requests_total",
            "Requests whose client named an objective, by whether it was met; refused ones missed it.",
            "objective",
            "outcome",
        )
        self._queue = histogram("disagg_queue_seconds", "Waiting for servers, in the orchestrator.")
        self._prefill_queue = histogram("disagg_prefill_queue_seconds", "Waiting for the first chunk, on its server.")
        self._prefill = histogram("disagg_prefill_seconds", "Computing the prompt.")
        self._transfer = histogram(
            "disagg_transfer_seconds", "First block asked for to last one verified.", _SHORT_SECONDS
        )
        self._exposed = histogram(
            "disagg_transfer_exposed_seconds", "The part of a transfer that prefill did not hide.", _SHORT_SECONDS
        )
        self._loop_lag = histogram(
            "disagg_event_loop_lag_seconds", "How late a timer came: every stream waited so long.", _LAG_SECONDS
        )
        self._total = counter("total_requests", "HTTP requests to generate.")
        self._stream = counter("stream_requests", "Of these, streamed.")
        self._nonstream = counter("nonstream_requests", "Of these, not streamed.")
        self._validation = counter("validation_exceptions", "Requests refused as invalid.")
        self._http = counter("http_exceptions", "Requests answered with an error other than that.")
        self._internal = counter("internal_errors", "Of those, mistakes of this process.")
        self._responses = counter("total_responses", "Sequences that ended with a finish reason.")

        self._scorecard = Scorecard(registry)
        self._uncounted: list[RequestStory] = []
        """Those that have ended. Counting many in a row costs a fraction of counting each when it ends: what is needed
        for it is in the processor's cache then."""

    def watch(self, dispatcher: Dispatcher) -> None:
        self._registry.register(_LiveNumbers(dispatcher, self._servers))

    def render(self) -> bytes:
        self._count()
        return generate_latest(self._registry)

    def totals(self) -> dict[str, float]:
        """Every counter without labels, by its name here."""
        self._count()
        return {
            sample.name: sample.value
            for family in self._registry.collect()
            if family.type == "counter"
            for sample in family.samples
            if not sample.labels and sample.name.endswith("_total")
        }

    def loop_lagged(self, lag_s: float) -> None:
        self._loop_lag.observe(lag_s)

    # HTTP.

    def request_began(self, *, stream: bool) -> None:
        self._total.inc()
        (self._stream if stream else self._nonstream).inc()

    def error_answered(self, error: DisaggregatedError) -> None:
        self._errors.labels(str(error.http_status)).inc()
        (self._validation if 400 <= error.http_status < 429 else self._http).inc()

    def crash_answered(self) -> None:
        self._errors.labels("500").inc()
        self._http.inc()
        self._internal.inc()

    # dispatch.RequestObserver.

    def attempt_failed(self, error: DisaggregatedError, *, goes_on: bool) -> None:
        self._attempts_failed.labels(type(error).__name__).inc()

    def request_ended(self, story: RequestStory) -> None:
        if log.writes_info:
            self._log(story, str(story.life.phase), story.life.story[-1][0])
        self._uncounted.append(story)
        if len(self._uncounted) >= UNCOUNTED_MAX:
            self._count()

    def _count(self) -> None:
        stories, self._uncounted = self._uncounted, []
        for story in stories:
            self._count_one(story)

    def _count_one(self, story: RequestStory) -> None:
        self._requests.labels(str(story.life.phase)).inc()
        self._tokens.inc(story.num_tokens)
        ended_s = story.life.story[-1][0]
        self._queue.observe(story.queue_s(until_s=ended_s))
        if story.finish_reason:
            self._responses.inc()
            self._e2e.observe(ended_s - story.arrived_s)
        if story.objectives is not NO_OBJECTIVES:
            self._observe_objectives(story, ended_s)
        self._observe_first_token(story)
        self._observe_attempts(story)

    def _observe_objectives(self, story: RequestStory, ended_s: float) -> None:
        if story.life.phase is Phase.CANCELLED:
            return
        wanted, has_ended = story.objectives, bool(story.finish_reason)
        for name, limit_s, took_s in (
            ("timeout", wanted.timeout_s, ended_s - story.arrived_s if has_ended else None),
            ("ttft", wanted.ttft_s, story.ttft_s),
            ("tpot", wanted.tpot_s, (story.tpot_s or 0.0) if has_ended else None),
        ):
            if limit_s is not None:
                is_met = took_s is not None and took_s <= limit_s
                self._objectives.labels(name, "met" if is_met else "missed").inc()

    def _observe_first_token(self, story: RequestStory) -> None:
        if (ttft_s := story.ttft_s) is None:
            return
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(story.num_prompt_tokens)
        self._cached_tokens.inc(story.num_cached_tokens)
        if (tpot_s := story.tpot_s) is not None:
            self._tpot.observe(tpot_s)
            self._gap.observe(story.longest_gap_s)

    def _observe_attempts(self, story: RequestStory) -> None:
        for attempt in story.attempts:
            if attempt.prefill_compute_s:
                self._prefill_queue.observe(attempt.prefill_queue_s)
                self._prefill.observe(attempt.prefill_compute_s)
            self._observe_reuse(attempt)
            self._scorecard.observe(attempt)
            if attempt.transport:
                self._bytes.labels(attempt.transport).inc(attempt.transfer_bytes)
                self._transfer.observe(attempt.transfer_s)
                self._exposed.observe(attempt.exposed_s)

    def _observe_reuse(self, attempt: AttemptStory) -> None:
        if attempt.saved_bytes:
            self._saved_bytes.inc(attempt.saved_bytes)
        if not attempt.reuse_verdict:
            return
        self._hints.labels(attempt.reuse_verdict).inc()
        self._reuse.observe(attempt.reuse_s)
        self._pulled_tokens.inc(attempt.num_pulled_tokens)
        self._pulled_bytes.inc(attempt.pulled_bytes)
        if attempt.reuse_verdict == "computing_is_cheaper":
            self._declined_tokens.inc(attempt.num_considered_tokens)

    def _log(self, story: RequestStory, outcome: str, ended_s: float) -> None:
        fields: dict[str, object] = {
            "request_id": story.request_id,
            "outcome": outcome,
            "finish_reason": story.finish_reason,
            "prompt_tokens": story.num_prompt_tokens,
            "cached_tokens": story.num_cached_tokens,
            "tokens": story.num_tokens,
            "e2e_s": ended_s - story.arrived_s,
            "attempts": len(story.attempts),
        }
        if story.ttft_s is not None:
            fields |= {"ttft_s": story.ttft_s, **story.ttft_parts()}
        if story.attempts:
            last = story.attempts[-1]
            fields |= {"context": last.context_instance, "generation": last.generation_instance}
            fields |= {"saved_bytes": last.saved_bytes, "pulled_tokens": last.num_pulled_tokens}
            fields |= {"transport": last.transport, "transfer_s": last.transfer_s, "exposed_s": last.exposed_s}
        if story.error:
            fields["error"] = story.error
        log.info("request_done", **fields)


_SERVER_GAUGES: Final = (
    ("disagg_blocks", "KV blocks of the server.", "num_blocks"),
    ("disagg_blocks_free", "KV blocks that a new sequence could have.", "num_blocks_free"),
    ("disagg_blocks_leased", "KV blocks held for a transfer.", "num_blocks_leased"),
    ("disagg_blocks_quarantined", "KV blocks that a late write could still reach.", "num_blocks_quarantined"),
    ("disagg_host_blocks", "KV blocks that the host tier of the server has room for.", "num_host_slots"),
    ("disagg_host_blocks_used", "Of these, blocks that are there.", "num_host_slots_used"),
    ("disagg_host_blocks_claimed", "Of these, kept for preempted sequences.", "num_host_slots_claimed"),
    ("disagg_sequences_running", "Sequences in the engine's batch.", "num_running"),
    ("disagg_sequences_waiting", "Sequences that wait inside the server.", "num_waiting"),
    ("disagg_step_age_seconds", "Since the last finished step while there is work.", "step_age_s"),
)

_SERVER_COUNTERS: Final = (
    ("disagg_sequences_preempted", "Times that a sequence had to give its blocks up.", "preemptions_total"),
    ("disagg_sequences_swapped", "Of these, with its blocks kept for it.", "swapped_sequences_total"),
    ("disagg_blocks_offloaded", "KV blocks copied to the host tier when they were evicted.", "offloaded_blocks_total"),
    ("disagg_blocks_onboarded", "KV blocks copied back from it.", "onboarded_blocks_total"),
    ("disagg_spec_decode_num_draft_tokens", "Tokens guessed by speculative decoding.", "draft_tokens_total"),
    ("disagg_spec_decode_num_accepted_tokens", "Of these, the ones that were right.", "accepted_draft_tokens_total"),
)
"""As the server counts them: from 0 again when it starts again, which Prometheus knows how to read."""


_LINK_FAMILIES: Final[tuple[tuple[type[Family], str, str, str], ...]] = (
    (CounterMetricFamily, "disagg_link_bytes", "KV that this server read or was read from it.", "bytes_total"),
    (CounterMetricFamily, "disagg_link_seconds", "Spent reading; several reads at once count each.", "seconds_total"),
    (CounterMetricFamily, "disagg_link_transfers", "Transfers that landed.", "transfers_total"),
    (CounterMetricFamily, "disagg_link_failures", "Transfers that did not.", "failures_total"),
    (CounterMetricFamily, "disagg_link_fallbacks", "Better transports that failed when a link was made.", "fallbacks"),
    (GaugeMetricFamily, "disagg_link_bytes_per_second", "Of the transfers that landed last.", "recent_bytes_per_s"),
)
"""One row a pair of servers that have exchanged blocks; a source counts by transport alone and names no peer."""


class _LiveNumbers(Collector):
    """Read from the books at each scrape: nothing to keep up to date, nothing to forget when a server goes."""

    def __init__(self, dispatcher: Dispatcher, servers: Iterable[Server]) -> None:
        self._dispatcher = dispatcher
        self._servers = servers

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "disagg_queue_depth", "Sequences that wait for servers.", value=len(self._dispatcher.queue)
        )
        yield GaugeMetricFamily(
            "disagg_queue_tokens", "That they are expected to take.", value=self._dispatcher.queue.num_tokens
        )
        yield GaugeMetricFamily(
            "disagg_queue_tenants", "To whom they belong.", value=self._dispatcher.queue.num_tenants
        )
        yield GaugeMetricFamily(
            "disagg_requests_active", "Sequences that wait or run.", value=self._dispatcher.stories.num_running
        )
        up = GaugeMetricFamily("disagg_server_up", "1 while the server takes requests.", labels=["role", "instance"])
        lost = CounterMetricFamily(
            "disagg_server_lost", "Times that the server at this address was lost.", labels=["role", "address"]
        )
        leaked = GaugeMetricFamily(
            "disagg_blocks_leaked", "Blocks still held by a server that has nothing to do.", labels=["role", "instance"]
        )
        for server in self._servers:
            labels = [server.role.value, server.instance_id]
            up.add_metric(labels, float(server.is_ready))
            lost.add_metric([server.role.value, server.address], server.num_times_lost)
            if server.client is not None:
                leaked.add_metric(labels, _num_leaked(server))
        yield from (up, lost, leaked)
        for kind, rows in ((GaugeMetricFamily, _SERVER_GAUGES), (CounterMetricFamily, _SERVER_COUNTERS)):
            yield from (
                self._of_each_server(kind(name, text, labels=["role", "instance"]), field) for name, text, field in rows
            )

        yield from link_families(server for server in self._servers if server.client is not None)

    def _of_each_server(self, family: Family, field: str) -> Family:
        for server in self._servers:
            if server.client is not None:
                family.add_metric([server.role.value, server.instance_id], getattr(server.heartbeat, field))
        return family


def link_families(servers: Iterable[Server]) -> Iterator[Family]:
    """What moved between each two servers, by transport and by whose memory it came from and went to."""
    labels = ["role", "instance", "peer", "transport", "devices"]
    families = [(kind(name, text, labels=labels), field) for kind, name, text, field in _LINK_FAMILIES]
    for server in servers:
        for link in server.heartbeat.links:
            values = [server.role.value, server.instance_id, link.peer_id, link.transport, link.devices]
            for family, field in families:
                family.add_metric(values, getattr(link, field))
    return (family for family, _ in families)


def _num_leaked(server: Server) -> int:
    heartbeat = server.heartbeat
    is_idle = not (server.shares or heartbeat.num_running or heartbeat.num_waiting)
    num_kept = heartbeat.num_blocks_leased + heartbeat.num_blocks_quarantined + heartbeat.num_host_slots_claimed
    return num_kept if is_idle else 0
