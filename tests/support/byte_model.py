"""A model of which only the text side exists: one token a byte, a chat template, one end-of-sequence token."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from disaggregated.text import ChatTemplate, Tokenizer
from orchestrator.served_model import ServedModel

END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return Tokenizer(backend, chat_template=ChatTemplate(TEMPLATE, {}), eos_token_ids=(256,))


def byte_model(*, num_tokens_max: int = 1024) -> ServedModel:
    return ServedModel(
        name="house/fake",
        aliases=("fake",),
        tokenizer=byte_tokenizer(),
        num_tokens_max=num_tokens_max,
        sampling_defaults={},
        created=1_700_000_000,
    )
