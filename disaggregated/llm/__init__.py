"""One-process mode: the servers' engine inside your own program, for text.

    prompts ──Prompt──▶ ids ──▶ EngineThread ──EventRouter──▶ Batch ──Sequence's ChoiceText──▶ RequestOutput

It is the baseline that disaggregation is compared with, the oracle that says which tokens are right, and the honest
choice where one process is enough. Importing this takes no torch; making an `LLM` does.
"""

from disaggregated.llm.guided import GuidedDecodingParams
from disaggregated.llm.llm import LLM
from disaggregated.llm.outputs import CompletionOutput, Logprob, RequestOutput
from disaggregated.llm.sampling import SamplingParams

__all__ = ["LLM", "CompletionOutput", "GuidedDecodingParams", "Logprob", "RequestOutput", "SamplingParams"]
