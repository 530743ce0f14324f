"""From the name of a model to its files on this machine, and what they say about its shape.

    name ──resolve()──▶ a directory in Hugging Face layout ──ModelConfig.load()──▶ numbers the engine is built from

GGUF files, the bundled model among them, are converted into such a directory once. Nothing here needs torch; what needs
numpy is imported only when weights are converted, because the orchestrator comes this way too and starts in a second.
"""

from disaggregated.model_files.model_config import ModelConfig, read_eos_token_ids, read_num_tokens_max
from disaggregated.model_files.resolve import ModelFiles, resolve

__all__ = ["ModelConfig", "ModelFiles", "read_eos_token_ids", "read_num_tokens_max", "resolve"]
