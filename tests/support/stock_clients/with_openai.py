"""The openai package, its blocking client: chats, streams, completions, responses, structured output, tools."""

# mypy: ignore-errors
# Its imports are of another environment.

import json
import sys
from typing import Literal

import openai
import pydantic


class City(pydantic.BaseModel):
    name: Literal["Paris", "Rome", "Berlin"]
    inhabitants: int = pydantic.Field(ge=0, le=99_999_999)


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
api, model = sys.argv[1:]
client = openai.OpenAI(base_url=api, api_key="none", max_retries=0)
ask = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
whole = client.chat.completions.create(**ask, max_tokens=16)
stream = client.chat.completions.create(**ask, max_tokens=16, stream=True)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
parsed = client.chat.completions.parse(**ask, max_tokens=60, response_format=City).choices[0].message.parsed
call = client.chat.completions.create(**ask, max_tokens=60, tools=[TOOL], tool_choice="required").choices[0]
first = client.responses.create(model=model, input="Count to three.", temperature=0, max_output_tokens=12)
with client.responses.stream(
    model=model, input="Go on.", previous_response_id=first.id, temperature=0, max_output_tokens=12
) as events:
    kinds = [event.type for event in events]
likely = client.completions.create(model=model, prompt="One, two,", max_tokens=3, logprobs=2, echo=True, temperature=0)
sys.stdout.write(
    json.dumps(
        {
            "text": whole.choices[0].message.content,
            "streamed": "".join(pieces),
            "city": parsed and parsed.name,
            "call": call.message.tool_calls[0].function.name,
            "arguments": call.message.tool_calls[0].function.arguments,
            "finish_reason": call.finish_reason,
            "response": first.output_text,
            "last_event": kinds[-1],
            "logprobs": len(likely.choices[0].logprobs.token_logprobs),
            "models": [one.id for one in client.models.list()],
        }
    )
)
