"""litellm: as a library in front of any server that speaks OpenAI's API."""

# mypy: ignore-errors
# Its imports are of another environment.

import asyncio
import json
import sys

import litellm

api, model = sys.argv[1:]
fields = {"model": f"openai/{model}", "api_base": api, "api_key": "none", "temperature": 0, "max_retries": 0}
ask = {**fields, "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}
whole = litellm.completion(**ask)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
later = asyncio.run(litellm.acompletion(**ask, response_format={"type": "json_object"}))
text = litellm.text_completion(
    **{**fields, "model": f"text-completion-openai/{model}"}, prompt="One, two,", max_tokens=4
)
response = litellm.responses(**fields, input="Count to three.", max_output_tokens=8)
sys.stdout.write(
    json.dumps(
        {
            "text": whole.choices[0].message.content,
            "streamed": "".join(pieces),
            "json": later.choices[0].message.content,
            "completed": text.choices[0].text,
            "response": response.output[0].content[0].text,
        }
    )
)
