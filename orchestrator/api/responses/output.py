"""A reply's deltas, gathered into the items that a Responses client expects: reasoning, messages, function calls."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from orchestrator.api.custom_tools import custom_input
from orchestrator.api.responses.tools import OfferedTools
from orchestrator.parsers import CallArguments, CallStart, Content, Delta, Reasoning

ItemStatus = Literal["in_progress", "completed", "incomplete"]


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Item:
    """One item of an output, and what it has so far."""

    output_index: int
    item_id: str
    pieces: list[str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class MessageItem(_Item):
    event: ClassVar[str] = "response.output_text"
    prefix: ClassVar[str] = "msg"

    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def as_json(self, status: ItemStatus) -> dict[str, Any]:
        """With "in_progress", as it was when it began."""
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, *, is_empty: bool = False) -> dict[str, Any]:
        text, logprobs = ("", []) if is_empty else (self.text, self.logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class ReasoningItem(_Item):
    event: ClassVar[str] = "response.reasoning_text"
    prefix: ClassVar[str] = "rs"

    def as_json(self, status: ItemStatus) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.item_id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def part(self, *, is_empty: bool = False) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": "" if is_empty else self.text}


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class CallItem(_Item):
    event: ClassVar[str] = "response.function_call_arguments"
    prefix: ClassVar[str] = "fc"
    kind: ClassVar[str] = "function_call"
    told_as: ClassVar[str] = "arguments"

    call_id: str
    name: str
    namespace: str | None = None

    def as_json(self, status: ItemStatus) -> dict[str, Any]:
        return {
            "id": self.item_id,
            "type": self.kind,
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            **({} if self.namespace is None else {"namespace": self.namespace}),
            self.told_as: "" if status == "in_progress" else self.text,
        }


class CustomCallItem(CallItem):
    """Its input is known as a whole only: the model writes it within JSON."""

    event: ClassVar[str] = "response.custom_tool_call_input"
    prefix: ClassVar[str] = "ctc"
    kind: ClassVar[str] = "custom_tool_call"
    told_as: ClassVar[str] = "input"

    @property
    def text(self) -> str:
        return custom_input("".join(self.pieces))


Item = MessageItem | ReasoningItem | CallItem


@dataclasses.dataclass(frozen=True, slots=True)
class Grown:
    """`item` got `text`, which is empty where it only began."""

    item: Item
    text: str
    logprobs: Sequence[dict[str, Any]] = ()


class Output:
    """The items of one reply, in the order in which the model began them. White space around calls is nobody's item."""

    def __init__(self, tools: OfferedTools) -> None:
        self._tools = tools
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text is not out yet; they belong to the message that grows next."""
        self.items: list[Item] = []
        self._calls: dict[int, CallItem] = {}
        self._blank = ""
        """Seen where no message was open; it belongs to the next message, if there is one."""

    def add(self, delta: Delta) -> list[Grown]:
        """What grew."""
        match delta:
            case Content(text):
                return self._add_content(text)
            case Reasoning(text):
                return [self._grow(ReasoningItem, text)]
            case CallStart(index, call_id, name):
                call = self._new_call(call_id, name)
                self._calls[index] = call
                self.items.append(call)
                return [Grown(call, "")]
            case CallArguments(index, text):
                call = self._calls[index]
                call.pieces.append(text)
                return [Grown(call, "" if isinstance(call, CustomCallItem) else text)]

    def add_all(self, deltas: Iterable[Delta], logprobs: Sequence[dict[str, Any]] = ()) -> list[Grown]:
        """What grew; `logprobs`, of the tokens that came with it, belong to the last message among that."""
        grown = [one for delta in deltas for one in self.add(delta)]
        self._logprobs += logprobs
        if self._logprobs and (last := _last_message(grown)) is not None:
            index, item = last
            grown[index] = Grown(item, grown[index].text, self._logprobs)
            item.logprobs += self._logprobs
            self._logprobs = []
        return grown

    def finish(self) -> list[Grown]:
        """A reply without a word is an empty message; one of nothing but white space is a message of it."""
        grown = [] if self.items else [self._grow(MessageItem, self._blank)]
        if self._logprobs and isinstance(last := self.items[-1], MessageItem):
            last.logprobs += self._logprobs
        return grown

    def as_json(self, *, is_cut: bool) -> list[dict[str, Any]]:
        """`is_cut`: the last item is not whole."""
        last = len(self.items) - 1
        return [
            item.as_json("incomplete" if is_cut and item.output_index == last else "completed") for item in self.items
        ]

    def _new_call(self, call_id: str, name: str) -> CallItem:
        tool = self._tools.called(name)
        make = CustomCallItem if tool.is_custom else CallItem
        return make(
            output_index=len(self.items),
            item_id=_new_id(make.prefix),
            call_id=call_id,
            name=tool.name,
            namespace=tool.namespace,
        )

    def _add_content(self, text: str) -> list[Grown]:
        if not (self.items and type(self.items[-1]) is MessageItem):
            text, self._blank = self._blank + text, ""
            if text.isspace():
                self._blank = text
                return []
        return [self._grow(MessageItem, text)]

    def _grow(self, kind: type[MessageItem] | type[ReasoningItem], text: str) -> Grown:
        last = self.items[-1] if self.items else None
        if not isinstance(last, kind):
            last = kind(output_index=len(self.items), item_id=_new_id(kind.prefix))
            self.items.append(last)
        last.pieces.append(text)
        return Grown(last, text)


def _last_message(grown: Sequence[Grown]) -> tuple[int, MessageItem] | None:
    for index in reversed(range(len(grown))):
        if isinstance(item := grown[index].item, MessageItem):
            return index, item
    return None


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
