"""langchain-openai: invoke, stream, batch, structured output, tools, and the responses API."""

# mypy: ignore-errors
# Its imports are of another environment.

import json
import sys
from typing import Literal

import pydantic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


class City(pydantic.BaseModel):
    """A city."""

    name: Literal["Paris", "Rome", "Berlin"]
    inhabitants: int = pydantic.Field(ge=0, le=99_999_999)


@tool
def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


api, model = sys.argv[1:]
fields = {"base_url": api, "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(**fields, max_tokens=40)
question = "What is the capital of France?"
whole = chat.invoke(question)
pieces = [chunk.text for chunk in chat.stream(question)]
city = chat.with_structured_output(City, method="json_schema").invoke("Tell me of Paris.")
called = chat.bind_tools([weather], tool_choice="any").invoke("How is the weather in Rome?")
responses = ChatOpenAI(**fields, max_tokens=12, use_responses_api=True).invoke(question)
completed = OpenAI(**fields, max_tokens=6).invoke("One, two,")
sys.stdout.write(
    json.dumps(
        {
            "text": whole.text,
            "streamed": "".join(pieces),
            "usage": whole.usage_metadata["total_tokens"],
            "city": city.name,
            "calls": [call["name"] for call in called.tool_calls],
            "response": responses.text,
            "completed": completed,
            "batch": len(chat.batch([question, question])),
        }
    )
)
