"""Who is held up by how many tokens, here and there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.prefill_balance import why_here
from orchestrator.server import Role, Server, Share


def server(role: Role, *, waiting: int = 0, num_decoding: int = 0) -> Server:
    made = Server(role, f"{role}-0")
    made.take(0, Share(waiting, waiting, 1, on_lost=lambda _: None))
    for key in range(1, num_decoding + 1):
        made.take(key, Share(10, 0, 1, on_lost=lambda _: None, is_decoding=True))
    return made


def context(waiting: int) -> Server:
    return server(Role.CONTEXT, waiting=waiting)


def generation(waiting: int = 0, num_decoding: int = 0) -> Server:
    return server(Role.GENERATION, waiting=waiting, num_decoding=num_decoding)


def test_an_idle_generation_server_helps_with_the_second_prompt_of_a_burst() -> None:
    assert why_here(256, [context(256)], generation()) == (
        "256 tokens hold somebody up here, 512 at the context servers"
    )


def test_a_prompt_alone_always_goes_to_a_context_server() -> None:
    assert why_here(256, [context(0)], generation()) == ""


def test_one_prompt_for_eight_chats_is_worth_eight_prompts_of_waiting() -> None:
    busy = generation(num_decoding=8)
    assert why_here(256, [context(8 * 256)], busy) == ""
    assert why_here(256, [context(8 * 256 + 1)], busy)


def test_what_the_generation_server_has_to_prefill_itself_counts() -> None:
    assert why_here(256, [context(512)], generation(waiting=512)) == ""
    assert why_here(256, [context(513)], generation(waiting=512))


def test_the_least_busy_context_server_is_what_counts() -> None:
    assert why_here(256, [context(5000), context(0)], generation()) == ""


def test_without_a_context_server_this_rule_has_nothing_to_say() -> None:
    assert why_here(256, [], generation()) == ""


@given(
    prompt=st.integers(1, 10_000), there=st.integers(0, 10_000), here=st.integers(0, 10_000), chats=st.integers(0, 20)
)
def test_more_waiting_there_never_speaks_against_here(prompt: int, there: int, here: int, chats: int) -> None:
    at = generation(here, chats)
    if why_here(prompt, [context(there)], at):
        assert why_here(prompt, [context(there + 1)], at)
        assert there >= prompt * chats
