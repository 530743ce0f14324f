"""A server's grammars, as its configuration and its model have them."""

from __future__ import annotations

from disaggregated import logs
from disaggregated.config.server import ServerConfig
from disaggregated.engine.grammar.backends import Backends
from disaggregated.engine.grammar.compiler import GrammarCompiler
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import ModelConfig, ModelFiles

log = logs.get(__name__)


def grammar_compiler(config: ServerConfig, files: ModelFiles, model: ModelConfig) -> GrammarCompiler | None:
    """None for a model whose tokens have no text that is known here: requests with a grammar are refused.

    Raises:
        ConfigError: a library is asked for that is not installed.
        ModelUnavailable: a library is asked for, and the model's tokens have no text.
    """
    try:
        vocabulary = Vocabulary.of_model(files.path, model.vocab_size)
    except ModelUnavailable as error:
        if config.guided_decoding_backend != "auto":
            raise
        log.info("grammars_off", because=error)
        return None
    backends = Backends(config.guided_decoding_backend, vocabulary)
    return GrammarCompiler(backends, eos_token_ids=vocabulary.eos_token_ids, vocab_size=model.vocab_size)
