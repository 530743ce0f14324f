"""The bodies that can be sent, field by field."""

from __future__ import annotations

from typing import Any, Final

from disaggregated.repetition_rule import PATTERN_SIZE_MAX
from disaggregated.repetition_rule import TOKENS_MAX as REPETITION_TOKENS_MAX
from disaggregated.sampling_params import LOGPROB_TOKEN_IDS_MAX, LOGPROBS_MAX, PENALTY_MAX
from disaggregated.structured.readers import CHOICES_MAX, TEXT_BYTES_MAX
from disaggregated.text.bad_words import BAD_WORDS_MAX
from orchestrator.api.generation_fields import CACHE_SALT_CHARACTERS_MAX
from orchestrator.api.known_fields import IGNORED, NEUTRAL
from orchestrator.api.messages import ROLES
from orchestrator.api.openapi.kinds import (
    Schema,
    array,
    flag,
    integer,
    mapping,
    number,
    one_of,
    record,
    ref,
    required,
    text,
    token_ids,
)
from orchestrator.api.prompts import PROMPTS_MAX
from orchestrator.api.reply_fields import REPLIES_MAX
from orchestrator.api.responses.body import INCLUDES, METADATA_MAX, OUTPUT_TOKENS_MAX, TOP_LOGPROBS_MAX, TRUNCATIONS
from orchestrator.api.responses.body import NOT_HERE as NOT_OF_RESPONSES
from orchestrator.api.sampling_fields import (
    LOGIT_BIASES_MAX,
    REPETITION_PENALTY_MIN,
    STOP_CHARACTERS_MAX,
    STOP_STRINGS_MAX,
    STOP_TOKEN_IDS_MAX,
    TOKENS_MAX,
    TOP_K_MAX,
)
from orchestrator.api.tools import TOOLS_MAX
from orchestrator.api.truncation import SIDES, TO_THE_MODEL

_WORDS: Final = {"type": "string", "minLength": 1}
_STOP: Final = {"type": "string", "minLength": 1, "maxLength": STOP_CHARACTERS_MAX}
_STOPS: Final = {"type": "array", "items": _STOP, "maxItems": STOP_STRINGS_MAX}
_IDS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

MODEL_NAME: Final[Schema] = {"type": "string", "minLength": 1, "description": "Of the model that is served."}

SAMPLING: Final[dict[str, Schema]] = {
    "temperature": number("0 always takes the likeliest token.", low=0.0, high=2.0),
    "top_p": number("Of the likeliest tokens, as many as have this probability together.", low=0.0, high=1.0),
    "top_k": integer("Of so many of the likeliest tokens; 0 and -1: of all.", low=-1, high=TOP_K_MAX),
    "min_p": number("Of the tokens with at least this part of the likeliest one's probability.", low=0.0, high=1.0),
    "seed": integer("With the same seed the same request gets the same tokens.", low=-(2**63), high=2**64 - 1),
    "max_tokens": integer("Tokens at most; cut to what the prompt leaves. 0 with echo.", low=0, high=TOKENS_MAX),
    "max_completion_tokens": integer("The newer name of max_tokens.", low=0, high=TOKENS_MAX),
    "min_tokens": integer("No end before so many tokens.", low=0, high=TOKENS_MAX),
    "stop": one_of("Texts that end the reply.", _STOP, _STOPS),
    "stop_token_ids": token_ids("Tokens that end the reply.", maxItems=STOP_TOKEN_IDS_MAX),
    "ignore_eos": flag("The model's own end of sequence does not end the reply."),
    "presence_penalty": number("Taken from the logits of tokens that the reply has.", low=-2.0, high=2.0),
    "frequency_penalty": number("The same, each time that it has them.", low=-2.0, high=2.0),
    "repetition_penalty": number(
        "Divides the logits of tokens that prompt or reply have.", low=REPETITION_PENALTY_MIN, high=PENALTY_MAX
    ),
    "logit_bias": mapping(
        "From token ids to what is added to their logits.",
        maxProperties=LOGIT_BIASES_MAX,
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    ),
    "bad_words": one_of("Never in the reply.", _WORDS, {"type": "array", "items": _WORDS, "maxItems": BAD_WORDS_MAX}),
    "allowed_token_ids": token_ids("Nothing else in the reply."),
    "repetition_detection": mapping(
        "The reply ends when it ends in a pattern of so many tokens so often.",
        properties={
            "max_pattern_size": integer("0: never.", low=0, high=PATTERN_SIZE_MAX),
            "min_pattern_size": integer("At most max_pattern_size.", low=0, high=PATTERN_SIZE_MAX),
            "min_count": integer("At least 2.", low=0, high=REPETITION_TOKENS_MAX),
        },
    ),
    "logprob_token_ids": token_ids(
        "With logprobs: how likely these were, in place of the likeliest.", maxItems=LOGPROB_TOKEN_IDS_MAX
    ),
}

REPLY: Final[dict[str, Schema]] = {
    "n": integer("Replies to each prompt.", low=1, high=REPLIES_MAX),
    "best_of": integer("Of so many replies, the n likeliest.", low=1, high=REPLIES_MAX),
    "echo": flag("The reply begins with the prompt; in chats with the last message, where that is the assistant's."),
    "top_logprobs": integer("So many of the likeliest tokens beside each.", low=0, high=LOGPROBS_MAX),
    "prompt_logprobs": integer("The same of the prompt's tokens.", low=0, high=LOGPROBS_MAX),
    "return_token_ids": flag("Token ids beside the text, and the prompt's."),
    "return_prompt_text": flag("The text that a chat was rendered to."),
    "return_tokens_as_token_ids": flag('In logprobs, tokens are spelled "token_id:42".'),
    "include_stop_str_in_output": flag("The text ends with what stopped it."),
    "skip_special_tokens": flag("Special tokens are not in the text.", default=True),
}

_SCHEMA: Final = {"anyOf": [{"type": "object"}, {"type": "string", "description": "The same as text."}]}
_CHOICES: Final = {"type": "array", "items": _WORDS, "minItems": 1, "maxItems": CHOICES_MAX}
_NAMED_SCHEMA: Final = record({"name": {"type": "string"}, "schema": _SCHEMA, "strict": flag("Exactly.")}, "schema")
_MEMBERS: Final = {"json": _SCHEMA, "json_object": flag("Any object."), "regex": _WORDS, "choice": _CHOICES}

STRUCTURED_REPLY: Final[dict[str, Schema]] = {
    "response_format": mapping(
        "JSON, or JSON of a schema.",
        required=["type"],
        properties={
            "type": {
                "enum": ["text", "json_object", "json_schema", "structural_tag", "json", "regex", "ebnf", "grammar"]
            },
            "json_schema": record(
                {"name": {"type": "string"}, "schema": _SCHEMA, "strict": flag("Exactly.")}, "schema"
            ),
        },
    ),
    "guided_json": one_of("A JSON schema for the reply.", *_SCHEMA["anyOf"]),
    "guided_json_object": flag("The reply is a JSON object."),
    "guided_regex": text("The whole reply matches it.", minLength=1, maxLength=TEXT_BYTES_MAX),
    "guided_choice": array("The reply is one of these.", _WORDS, minItems=1, maxItems=CHOICES_MAX),
    "guided_grammar": text("The reply is a sentence of it: EBNF or Lark.", minLength=1, maxLength=TEXT_BYTES_MAX),
    "structured_outputs": mapping("One of these, as vLLM spells it.", properties=_MEMBERS),
    "guided_decoding": mapping("One of these, as TensorRT-LLM spells it.", properties=_MEMBERS),
}
"""One at most."""

_TOOL: Final = record(
    {
        "type": {"const": "function"},
        "function": record(
            {"name": {"type": "string"}, "description": text("What it is for."), "parameters": mapping("JSON schema.")},
            "name",
        ),
    },
    "function",
)
_GRAMMAR: Final = record(
    {"syntax": {"enum": ["lark", "regex"]}, "definition": {**_WORDS, "maxLength": TEXT_BYTES_MAX}},
    "syntax",
    "definition",
)
_CUSTOM_TOOL: Final = record(
    {
        "type": {"const": "custom"},
        "custom": record(
            {
                "name": {"type": "string"},
                "description": text("What it is for."),
                "format": one_of(
                    "What its input has to be.",
                    record({"type": {"const": "text"}}, "type"),
                    record({"type": {"const": "grammar"}, "grammar": _GRAMMAR}, "type", "grammar"),
                ),
            },
            "name",
        ),
    },
    "type",
    "custom",
)

COMMON: Final[dict[str, Schema]] = {
    "model": ref("ModelName"),
    "stream": flag("The answer comes in events."),
    "stream_options": mapping(
        "Only when stream is true.",
        properties={
            "include_usage": flag("The last event but one counts tokens; usage is null in the others."),
            "continuous_usage_stats": flag("Every event tells the counts so far."),
            "include_obfuscation": flag("Taken without an effect: nothing is padded."),
        },
    ),
    "priority": integer("A lower one is served earlier.", low=-(2**31), high=2**31 - 1),
    "cache_salt": text("Prompts are found in caches with the same one only.", maxLength=CACHE_SALT_CHARACTERS_MAX),
    "truncate_prompt_tokens": integer(
        "Of a longer prompt, only so many tokens; -1: as many as fit. Not 0.", low=TO_THE_MODEL, high=TOKENS_MAX
    ),
    "truncation_side": text("Of a longer prompt, left drops the first tokens, right the last.", enum=[*SIDES, None]),
    **SAMPLING,
    **REPLY,
    **STRUCTURED_REPLY,
    **{name: {"enum": [*values, None], "description": "Nothing else."} for name, values in NEUTRAL.items()},
    **{name: {"description": "Taken, without an effect on tokens."} for name in IGNORED - {"stream_options"}},
}
"""Of chats and of text completions."""

TEMPLATE: Final[dict[str, Schema]] = {
    "tools": array(
        "Functions and custom tools that the model may call.", {"anyOf": [_TOOL, _CUSTOM_TOOL]}, maxItems=TOOLS_MAX
    ),
    "tool_choice": one_of(
        "Whether it must.",
        {"enum": ["none", "auto", "required", "any"]},
        record({"type": {"type": "string"}, "function": record({"name": {"type": "string"}}, "name")}, "type"),
    ),
    "parallel_tool_calls": flag("Several calls in one reply.", default=True),
    "functions": array("The older form of tools.", record({"name": {"type": "string"}}, "name")),
    "function_call": one_of(
        "The older form of tool_choice.", {"enum": ["none", "auto"]}, record({"name": {"type": "string"}}, "name")
    ),
    "separate_reasoning": flag("Reasoning in a field of its own.", default=True),
    "include_reasoning": flag("Reasoning in the answer at all.", default=True),
    "reasoning_effort": text('For the chat template; "none": no reasoning.'),
    "thinking": {"description": '{"type": "enabled"} or {"type": "disabled"}.'},
    "enable_thinking": {"description": "Whether to reason."},
    "thinking_token_budget": integer("Of reasoning, then it is ended; -1: no limit.", low=-1, high=TOKENS_MAX),
    "chat_template": text("Refused unless the deployment allows it."),
    "chat_template_kwargs": mapping("Variables for the chat template."),
    "documents": array("For templates that show them.", {"type": "object"}),
    "add_generation_prompt": flag("The prompt ends where the assistant begins.", default=True),
    "continue_final_message": flag("The reply goes on from the last message; add_generation_prompt is false then."),
}
"""What goes into the prompt of a chat besides its messages."""

_MESSAGE: Final = record(
    {
        "role": {"enum": sorted(ROLES)},
        "content": one_of(
            "Text.", {"type": "string"}, {"type": "array", "items": {"anyOf": [{"type": "string"}, ref("TextPart")]}}
        ),
        "tool_calls": array("Of an assistant.", {"type": "object"}),
        "tool_call_id": text("Of a tool's answer."),
        "name": text("Whose message."),
        "reasoning_content": text("Of an assistant."),
        "prefix": flag("The reply goes on from it: of the assistant's last message."),
    },
    "role",
)

_MESSAGES: Final = {"type": "array", "items": ref("Message"), "minItems": 1}

_PROMPT: Final = required(
    one_of(
        "A text, token ids, or several of either.",
        {"type": "string", "minLength": 1},
        {"type": "array", "items": _WORDS, "minItems": 1, "maxItems": PROMPTS_MAX},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": PROMPTS_MAX},
    )
)

_RESPONSES: Final[dict[str, Schema]] = {
    "input": required(one_of("A text, or items.", {"type": "string"}, {"type": "array", "items": {"type": "object"}})),
    "instructions": text("The system's message; not handed on to later responses."),
    "previous_response_id": text("Whose conversation goes on."),
    "max_output_tokens": integer("Tokens at most.", low=1, high=OUTPUT_TOKENS_MAX),
    "max_tool_calls": integer("Of tools that run here, of which there are none.", low=0, high=OUTPUT_TOKENS_MAX),
    "text": mapping("format, as a response_format, and verbosity."),
    "reasoning": mapping("effort and summary."),
    "include": array("What else to tell.", {"enum": sorted(INCLUDES)}),
    "store": flag("It may be looked up and gone on from.", default=True),
    "metadata": mapping("Kept with it.", maxProperties=METADATA_MAX, additionalProperties={"type": "string"}),
    "tools": array("Functions that the model may call.", record({"type": {"const": "function"}}, "type", "name")),
    "tool_choice": one_of("Whether it must.", {"type": "string"}, {"type": "object"}),
    "parallel_tool_calls": TEMPLATE["parallel_tool_calls"],
    "top_logprobs": integer("With include.", low=0, high=TOP_LOGPROBS_MAX),
    "truncation": text("auto: of a long conversation, what was said first is left out.", enum=[*TRUNCATIONS, None]),
    "stream_options": mapping("include_obfuscation has no effect.", properties={"include_obfuscation": flag("")}),
    "model": COMMON["model"],
    "stream": COMMON["stream"],
    **{name: schema for name, schema in SAMPLING.items() if name not in ("max_tokens", "max_completion_tokens")},
    **{name: {"enum": [*values, None], "description": "Nothing else."} for name, values in NOT_OF_RESPONSES.items()},
}

_CHAT_FIELDS: Final = {
    **COMMON,
    **TEMPLATE,
    "messages": _MESSAGES,
    "logprobs": flag("Logprobs of the reply's tokens."),
    "add_special_tokens": flag("As the tokenizer adds them to texts, besides the template's own."),
}

SCHEMAS: Final[dict[str, Any]] = {
    "TextPart": record({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text"),
    "Message": _MESSAGE,
    "ChatCompletionRequest": record(_CHAT_FIELDS, "model", "messages"),
    "CompletionRequest": record(
        {
            **COMMON,
            "prompt": _PROMPT,
            "logprobs": one_of(
                "Logprobs of the reply's tokens, and so many of the likeliest.",
                {"type": "integer", "minimum": 0, "maximum": LOGPROBS_MAX},
                {"const": False},
            ),
            "add_special_tokens": flag("As the tokenizer adds them to texts.", default=True),
        },
        "model",
        "prompt",
    ),
    "ResponsesRequest": record(_RESPONSES, "model", "input"),
    "TokenizeRequest": record(
        {
            **TEMPLATE,
            "model": one_of("May be left out.", ref("ModelName")),
            "prompt": text("Either this or messages."),
            "messages": array("Either these or a prompt.", ref("Message"), minItems=1),
            "add_special_tokens": flag("As the tokenizer adds them to texts.", default=True),
            "return_token_strs": flag("Also how the vocabulary spells each token."),
        }
    )
    | {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]},
    "DetokenizeRequest": record(
        {
            "model": one_of("May be left out.", ref("ModelName")),
            "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "skip_special_tokens": flag("Special tokens are not in the text."),
        },
        "tokens",
    ),
    "ScaleRequest": {
        "type": "object",
        "minProperties": 1,
        "properties": {role: integer("Servers.", low=0, high=10_000) for role in ("context", "generation")},
        "additionalProperties": False,
    },
}
