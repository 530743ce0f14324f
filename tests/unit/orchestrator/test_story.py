from __future__ import annotations

import pytest

from disaggregated.request_life import Phase, RequestLife
from disaggregated.v1 import control_pb2
from orchestrator.story import AttemptStory, RequestStory, StoryShelf


def story_of(request_id: str = "r1", *, arrived_s: float = 0.0) -> RequestStory:
    return RequestStory(life=RequestLife(request_id, now_s=arrived_s + 0.5), arrived_s=arrived_s, num_prompt_tokens=10)


def begin_attempt(story: RequestStory, now_s: float, **fields: str) -> AttemptStory:
    attempt = AttemptStory(context_instance=fields.get("context", "c0"), generation_instance="g0", began_s=now_s)
    story.attempts.append(attempt)
    story.life.advance(Phase.PREFILLING, now_s=now_s)
    return attempt


def test_the_parts_of_a_ttft_add_up_also_after_a_lost_attempt() -> None:
    story = story_of()
    lost = begin_attempt(story, 2.0)
    lost.ended_s = 3.0
    story.life.advance(Phase.QUEUED, now_s=3.0)
    winner = begin_attempt(story, 3.25)
    reuse = control_pb2.PrefixReuse(verdict="pulled", spent_s=0.125, num_tokens=64, num_bytes=4096)
    winner.prefilled(control_pb2.PrefillOutcome(queue_s=0.5, compute_s=1.0, reuse=reuse), reuse_from="g0")
    assert (winner.num_pulled_tokens, winner.pulled_bytes, winner.reuse_verdict) == (64, 4096, "pulled")
    story.tokens_came(1, now_s=5.0)
    assert story.ttft_parts() == pytest.approx(
        {
            "prepare_s": 0.5,
            "queue_s": 1.75,
            "lost_attempts_s": 1.0,
            "prefix_reuse_s": 0.125,
            "prefill_queue_s": 0.5,
            "prefill_compute_s": 1.0,
            "hand_off_s": 0.125,
        }
    )
    assert sum(story.ttft_parts().values()) == story.ttft_s == 5.0


def test_a_request_without_a_token_has_no_ttft() -> None:
    story = story_of()
    assert story.ttft_s is None
    assert story.ttft_parts() == {}
    assert story.tpot_s is None
    assert story.num_cached_tokens == 0


def test_gaps_and_pace_are_those_of_the_client() -> None:
    story = story_of()
    begin_attempt(story, 1.0)
    for now_s, count in ((2.0, 1), (2.5, 1), (4.0, 2)):
        story.tokens_came(count, now_s=now_s)
    assert (story.num_tokens, story.longest_gap_s) == (4, 1.5)
    assert story.tpot_s == pytest.approx(2.0 / 3)


def test_cached_tokens_are_those_of_the_attempt_that_gave_the_first_token() -> None:
    story = story_of()
    begin_attempt(story, 1.0).num_cached_tokens = 3
    story.life.advance(Phase.QUEUED, now_s=1.5)
    begin_attempt(story, 2.0).num_cached_tokens = 8
    story.tokens_came(1, now_s=3.0)
    assert story.num_cached_tokens == 8


def test_a_local_prefill_takes_its_times_from_the_admission_and_a_remote_one_does_not() -> None:
    times = control_pb2.AdmissionTimes(
        queue_s=1.0, compute_s=2.0, transfer_s=0.5, transport="SHM", transfer_bytes=99, num_cached_tokens=7
    )
    story = story_of()
    local, remote = (
        begin_attempt(story, 1.0, context=""),
        AttemptStory(context_instance="c0", generation_instance="g0"),
    )
    for attempt in (local, remote):
        attempt.admitted(times)
    assert (local.prefill_queue_s, local.prefill_compute_s, local.num_cached_tokens) == (1.0, 2.0, 7)
    assert (remote.prefill_queue_s, remote.prefill_compute_s, remote.num_cached_tokens) == (0.0, 0.0, 0)
    assert (remote.transport, remote.transfer_bytes) == ("SHM", 99)


def test_a_story_as_json_counts_from_the_arrival() -> None:
    story = story_of(arrived_s=100.0)
    begin_attempt(story, 101.0)
    story.tokens_came(1, now_s=102.0)
    story.life.advance(Phase.FINISHED, now_s=103.0)
    told = story.as_json(now_s=999.0)
    assert told["e2e_s"] == 3.0
    assert told["story"] == [[0.5, "queued"], [1.0, "prefilling"], [3.0, "finished"]]
    assert told["attempts"][0]["began_s"] == 1.0
    assert told["phases"] == {"queued": 0.5, "prefilling": 2.0}


def test_the_shelf_keeps_the_running_and_the_last_few() -> None:
    shelf = StoryShelf(2)
    stories = [story_of(f"r{number}") for number in range(4)]
    for story in stories:
        shelf.began(story)
    for story in stories[:3]:
        shelf.ended(story)
    assert [shelf.find(f"r{number}") for number in range(4)] == [None, *stories[1:]]
    assert shelf.num_running == 1


def test_two_requests_of_one_id_are_two_requests() -> None:
    shelf = StoryShelf(5)
    one, two = story_of("same"), story_of("same")
    shelf.began(one)
    shelf.began(two)
    assert shelf.num_running == 2
    assert shelf.find("same") is two
    shelf.ended(one)
    assert shelf.find("same") is two
    shelf.ended(two)
    assert shelf.num_running == 0
