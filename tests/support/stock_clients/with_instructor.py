"""instructor: typed answers, by JSON schema and by tools."""

# mypy: ignore-errors
# Its imports are of another environment.

import json
import sys
from typing import Literal

import instructor
import openai
import pydantic


class City(pydantic.BaseModel):
    name: Literal["Paris", "Rome", "Berlin"]
    inhabitants: int = pydantic.Field(ge=0, le=99_999_999)


api, model = sys.argv[1:]
plain = openai.OpenAI(base_url=api, api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Paris has two million inhabitants."}]
names = {}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
    client = instructor.from_openai(plain, mode=mode)
    city = client.chat.completions.create(
        model=model, messages=messages, response_model=City, max_tokens=80, temperature=0, max_retries=0
    )
    names[mode.name] = [city.name, city.inhabitants]
sys.stdout.write(json.dumps(names))
