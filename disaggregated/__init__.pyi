"""Types of the names that `__init__.py` finds when they are asked for."""

from disaggregated.llm import LLM as LLM
from disaggregated.llm import CompletionOutput as CompletionOutput
from disaggregated.llm import GuidedDecodingParams as GuidedDecodingParams
from disaggregated.llm import RequestOutput as RequestOutput
from disaggregated.llm import SamplingParams as SamplingParams

__version__: str
