"""From checked prompts and sampling to the sequences that the engine will generate."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from disaggregated.engine.api import EngineRequest, RequestKind
from disaggregated.errors import InvalidRequest
from disaggregated.llm.outputs import CompletionOutput, RequestOutput
from disaggregated.llm.prompts import Prompt
from disaggregated.llm.sampling import SamplingParams
from disaggregated.llm.sequence import Sequence
from disaggregated.text import ChoiceText, Tokenizer

Params = SamplingParams | SequenceOf[SamplingParams] | None
"""For all prompts, or one for each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """One call's work: `sequences` grow into `outputs`, which are in the order of the prompts."""

    outputs: list[RequestOutput]
    sequences: list[Sequence]


class RequestMaker:
    """For one model. Ids are never used twice."""

    def __init__(
        self, tokenizer: Tokenizer, *, sampling_defaults: Mapping[str, float], vocab_size: int, num_tokens_max: int
    ) -> None:
        self._tokenizer = tokenizer
        self._sampling_defaults = sampling_defaults
        self._vocab_size = vocab_size
        self._num_tokens_max = num_tokens_max
        self._numbers = itertools.count()

    def make(self, prompts: SequenceOf[Prompt], params: Params, *, default: SamplingParams) -> Requests:
        """
        Raises:
            InvalidRequest: there are more or fewer params than prompts, or a param that this model does not take.
        """
        requests = Requests(outputs=[], sequences=[])
        for prompt, sampling in zip(prompts, _one_each(params or default, len(prompts)), strict=True):
            self._add(prompt, sampling, requests)
        return requests

    def _add(self, prompt: Prompt, sampling: SamplingParams, requests: Requests) -> None:
        each_sampling = sampling.for_engine(
            self._sampling_defaults,
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            room=self._num_tokens_max - len(prompt.token_ids),
        )
        request_id = f"llm-{next(self._numbers)}"
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids,
            outputs=[CompletionOutput(index=index) for index in range(sampling.n)],
        )
        requests.outputs.append(output)
        for completion, engine_sampling in zip(output.outputs, each_sampling, strict=True):
            request = EngineRequest(
                request_id=f"{request_id}.{completion.index}",
                kind=RequestKind.FULL,
                token_ids=prompt.token_ids,
                sampling=engine_sampling,
            )
            text = ChoiceText(
                self._tokenizer,
                prompt.token_ids,
                sampling.stop_strings,
                skip_special_tokens=sampling.skip_special_tokens,
                include_stop=sampling.include_stop_str_in_output,
            )
            requests.sequences.append(Sequence(request, output, completion, text, self._tokenizer))


def _one_each(params: SamplingParams | SequenceOf[SamplingParams], num_prompts: int) -> SequenceOf[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, (list, tuple)) or not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequest("sampling_params must be SamplingParams, or a list of them", param="sampling_params")
    if len(params) != num_prompts:
        raise InvalidRequest(
            f"sampling_params has {len(params)} entries, there are {num_prompts} prompts", param="sampling_params"
        )
    return params
