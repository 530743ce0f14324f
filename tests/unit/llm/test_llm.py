"""The real model in one process: text in, the tokens of transformers out."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest
import torch
import transformers

from disaggregated import LLM, RequestOutput, SamplingParams
from disaggregated.errors import ConfigError, InvalidRequest, ModelUnavailable, PromptTooLong, RequestCancelled
from disaggregated.model_files import resolve

MODEL = "smollm2-135m-instruct"
OPTIONS: Final[Mapping[str, Any]] = {
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_seq_len": 512,
    "kv_cache_config": {"max_tokens": 4096},
}
PROMPTS = ["The capital of France is", "Hello, my name is", "1, 2, 3,", "Once upon a time", "def main("]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=10, ignore_eos=True)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32).eval()


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_are_those_of_transformers(llm: LLM, reference: transformers.LlamaForCausalLM) -> None:
    [output] = llm.generate(PROMPTS[0], GREEDY)
    prompt = torch.tensor([output.prompt_token_ids])
    with torch.inference_mode():
        expected = reference.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert output.outputs[0].token_ids == expected[0, prompt.shape[1] :].tolist()
    assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
    assert output.prompt == PROMPTS[0]
    assert output.outputs[0].finish_reason == "length"


def test_penalties_and_bad_words_are_those_of_transformers(llm: LLM, reference: transformers.LlamaForCausalLM) -> None:
    sampling = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, repetition_penalty=1.2, bad_words=["Paris", "the city"]
    )
    [output] = llm.generate("Paris is the capital of France. The capital of France is", sampling)
    prompt = torch.tensor([output.prompt_token_ids])
    words = [llm.tokenizer.encode(word, False) for word in ("Paris", " Paris", "the city", " the city")]
    with torch.inference_mode():
        expected = reference.generate(
            prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=1.2,
            bad_words_ids=words,
        )  # fmt: skip
    assert output.outputs[0].token_ids == expected[0, prompt.shape[1] :].tolist()
    assert "Paris" not in output.outputs[0].text


def test_labels_are_scored_by_their_ids(llm: LLM) -> None:
    likeliest = llm.generate(PROMPTS[0], dataclasses.replace(GREEDY, logprobs=4))[0].outputs[0].logprobs
    assert likeliest is not None
    asked = [*reversed(likeliest[0])]
    sampling = dataclasses.replace(GREEDY, logprobs=0, logprob_token_ids=asked)
    labels = llm.generate(PROMPTS[0], sampling)[0].outputs[0].logprobs
    assert labels is not None
    assert {token: told.logprob for token, told in labels[0].items()} == pytest.approx(
        {token: told.logprob for token, told in likeliest[0].items()}
    )
    assert all(set(told) >= set(asked) for told in labels)
    assert [told.rank for token, told in labels[0].items() if likeliest[0][token].rank != 1] == [None] * 3


def test_logprobs_are_those_of_transformers(llm: LLM, reference: transformers.LlamaForCausalLM) -> None:
    sampling = dataclasses.replace(SEEDED, logprobs=3, prompt_logprobs=0)
    [output] = llm.generate(PROMPTS[3], sampling)
    completion = output.outputs[0]
    sequence = [*output.prompt_token_ids, *completion.token_ids]
    with torch.inference_mode():
        expected = reference(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
    assert completion.logprobs is not None
    for position, (token_id, told) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True), start=len(output.prompt_token_ids) - 1
    ):
        assert set(told) == {token_id, *expected[position].topk(3).indices.tolist()}
        for other, one in told.items():
            assert one.logprob == pytest.approx(float(expected[position, other]), abs=1e-4)
            assert one.rank == int((expected[position] >= expected[position, other]).sum())
            assert one.decoded_token == llm.tokenizer.decode([other])
    assert completion.cumulative_logprob == pytest.approx(
        sum(told[token_id].logprob for token_id, told in zip(completion.token_ids, completion.logprobs, strict=True))
    )
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, (token_id, of_prompt) in enumerate(
        zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ):
        assert of_prompt is not None
        assert of_prompt[token_id].logprob == pytest.approx(float(expected[position, token_id]), abs=1e-4)


def test_what_was_told_in_a_stream_stays_as_it_was(llm: LLM) -> None:
    sampling = dataclasses.replace(GREEDY, logprobs=0)
    seen = [output.outputs[0].logprobs or [] for output in llm.stream(PROMPTS[0], sampling)]
    assert [len(each) for each in seen] == list(range(1, 11))
    assert seen[-1] == llm.generate(PROMPTS[0], sampling)[0].outputs[0].logprobs


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_a_prompt_has_the_same_tokens_alone_and_among_others(llm: LLM, sampling: SamplingParams) -> None:
    together = token_ids(llm.generate(PROMPTS, sampling))
    assert together == [token_ids(llm.generate(prompt, sampling))[0] for prompt in PROMPTS]
    assert len(set(map(tuple, together))) == len(PROMPTS)


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    params = [GREEDY, SEEDED, SamplingParams(temperature=0, max_tokens=3)]
    mixed = token_ids(llm.generate([PROMPTS[0]] * 3, params))
    assert mixed == [token_ids(llm.generate(PROMPTS[0], each))[0] for each in params]
    with pytest.raises(InvalidRequest, match="sampling_params has 3 entries, there are 2 prompts"):
        llm.generate(PROMPTS[:2], params)


def test_token_ids_and_text_are_the_same_prompt(llm: LLM) -> None:
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    assert token_ids(llm.generate(ids, GREEDY)) == token_ids(llm.generate(PROMPTS[:2], GREEDY))
    assert token_ids(llm.generate(ids[0], GREEDY)) == token_ids(llm.generate(PROMPTS[0], GREEDY))


def test_another_seed_gives_other_tokens_and_the_same_one_the_same(llm: LLM) -> None:
    def seeded(seed: int | None) -> list[int]:
        return token_ids(llm.generate(PROMPTS[3], SamplingParams(temperature=1.0, seed=seed, max_tokens=10)))[0]

    assert seeded(1) == seeded(1) != seeded(2)
    assert seeded(None) != seeded(None)


def test_n_sequences_are_those_of_consecutive_seeds(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True}
    [output] = llm.generate(PROMPTS[3], SamplingParams(n=3, seed=11, **params))
    alone = [token_ids(llm.generate(PROMPTS[3], SamplingParams(seed=seed, **params)))[0] for seed in (11, 12, 13)]
    assert [completion.token_ids for completion in output.outputs] == alone


def test_text_ends_before_a_stop_string(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[2], GREEDY)[0].outputs[0].text
    [output] = llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=200, stop=[" 6", "never"]))
    assert output.outputs[0].text == whole[: whole.index(" 6")]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == " 6"


def test_a_chat_is_its_rendered_prompt(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    [output] = llm.chat(messages, GREEDY)
    assert output.prompt == llm.tokenizer.render_chat(messages)
    assert output.prompt is not None
    assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt, False)
    [both, _] = llm.chat([messages, [{"role": "user", "content": "Bye."}]], GREEDY)
    assert token_ids([both]) == token_ids([output])


def test_a_chat_without_sampling_goes_on_until_the_model_ends_it(llm: LLM) -> None:
    [output] = llm.chat([{"role": "user", "content": "Say hello."}], SamplingParams(temperature=0, max_tokens=None))
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert output.outputs[0].token_ids[-1] in llm.tokenizer.eos_token_ids
    assert "<|im_end|>" not in output.outputs[0].text


def test_max_tokens_is_cut_to_the_longest_sequence(llm: LLM) -> None:
    prompt = [100] * 508
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == llm.num_tokens_max - 508 == 4
    with pytest.raises(PromptTooLong, match=r"^prompts has 512 tokens; with one token after it, 512 is the limit"):
        llm.generate([100] * 512)


def test_a_stream_grows_into_the_whole_output(llm: LLM) -> None:
    seen = [output.outputs[0] for output in llm.stream(PROMPTS[0], GREEDY)]
    assert [len(each.token_ids) for each in seen] == list(range(1, 11))
    assert all(after.text.startswith(before.text) for before, after in itertools.pairwise(seen))
    assert [each.finish_reason for each in seen] == [None] * 9 + ["length"]
    assert seen[-1] == llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]


async def test_a_stream_does_not_block_the_event_loop(llm: LLM) -> None:
    seen = [output async for output in llm.generate_async(PROMPTS[0], GREEDY)]
    assert seen[-1].finished
    assert token_ids(seen[-1:]) == token_ids(llm.generate(PROMPTS[0], GREEDY))


def test_a_stream_that_is_left_leaves_the_engine_to_others(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm._engine.ledger().result(WAIT_S) == []


def test_a_second_run_of_a_prompt_finds_its_beginning_cached(llm: LLM) -> None:
    prompt = [200 + position for position in range(100)]
    first, second = llm.generate(prompt, GREEDY), llm.generate(prompt, GREEDY)
    assert (first[0].num_cached_tokens, second[0].num_cached_tokens) == (0, 96)
    assert token_ids(first) == token_ids(second)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batchsize": 4}, "LLM: max_batchsize: unknown key"),
        ({"max_batch_size": 0}, "LLM: max_batch_size: must be at least 1"),
        ({"kv_cache_config": {"max_token": 5}}, "LLM: kv_cache_config.max_token: unknown key"),
        ({"kv_cache_config": 5}, "LLM: kv_cache_config: must be a section of keys"),
        ({"tensor_parallel_size": 2}, "LLM: tensor_parallel_size: 2 is not built yet"),
        ({"cpu_affinity": [0]}, "LLM: cpu_affinity: pins a server's process"),
        ({"max_seq_len": 10**6}, "max_seq_len: must be 1 to 8192"),
    ],
)
def test_a_wrong_option_is_told_by_its_name(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        LLM(MODEL, **options)


def test_a_model_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelUnavailable):
        LLM("/nowhere")


def test_closing_ends_the_thread_and_whoever_generates() -> None:
    before = set(threading.enumerate())
    llm = LLM(MODEL, **OPTIONS)
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RequestCancelled, match="the LLM is closed"):
        list(stream)
    with pytest.raises(RequestCancelled, match="the LLM is closed"):
        llm.generate("Hello")
    assert set(threading.enumerate()) == before


def test_a_forgotten_llm_is_closed() -> None:
    before = set(threading.enumerate())
    llm = LLM(MODEL, **OPTIONS)
    llm.generate("Hello", GREEDY)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert set(threading.enumerate()) <= before, "a thread of it is left"


def test_neither_the_package_nor_the_orchestrator_loads_torch() -> None:
    code = (
        "import sys, disaggregated, orchestrator.cli, orchestrator.run; from disaggregated import SamplingParams; "
        "SamplingParams(temperature=0); assert 'LLM' in dir(disaggregated); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout.strip() == "False"


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    import disaggregated

    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = disaggregated.LLMs  # type: ignore[attr-defined]
