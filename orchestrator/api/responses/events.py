"""The events of a streamed response: in OpenAI's order, numbered, each item opened and closed.

created ▶ in_progress ▶ (item added ▶ part added ▶ deltas ▶ text done ▶ part done ▶ item done)* ▶ completed | incomplete
"""

from __future__ import annotations

from typing import Any

import orjson

from orchestrator.api.responses.output import CallItem, CustomCallItem, Grown, Item, ItemStatus, MessageItem


class EventWriter:
    """Turns what grows into events. At most one item is open at a time."""

    def __init__(self) -> None:
        self._open: Item | None = None
        self._delta_head = b""
        """Of the open item's deltas: all that does not change from one to the next."""
        self._num_events = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        body = orjson.dumps({"type": kind, **fields, "sequence_number": self._num_events})
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    def grown(self, grown: Grown) -> bytes:
        events = b""
        if grown.item is not self._open:
            events = self.close("completed") + self._opened(grown.item)
        if not grown.text:
            return events
        if grown.logprobs:
            place, kind = _place(grown.item), f"{grown.item.event}.delta"
            return events + self.event(kind, **place, delta=grown.text, logprobs=grown.logprobs)
        number = self._num_events
        self._num_events += 1
        return b'%b%b%b,"sequence_number":%d}\n\n' % (events, self._delta_head, orjson.dumps(grown.text), number)

    def close(self, status: ItemStatus) -> bytes:
        """The end of the item that is open, if one is."""
        item, self._open = self._open, None
        if item is None:
            return b""
        kind, place = f"{item.event}.done", _place(item)
        if isinstance(item, CustomCallItem):
            events = self.event(f"{item.event}.delta", **place, delta=item.text)
            events += self.event(kind, **place, input=item.text)
        elif isinstance(item, CallItem):
            events = self.event(kind, **place, name=item.name, arguments=item.text)
        else:
            logprobs = {"logprobs": item.logprobs} if isinstance(item, MessageItem) else {}
            events = self.event(kind, **place, text=item.text, **logprobs)
            events += self.event("response.content_part.done", **place, part=item.part())
        whole = item.as_json(status)
        return events + self.event("response.output_item.done", output_index=item.output_index, item=whole)

    def _opened(self, item: Item) -> bytes:
        self._open = item
        kind = f"{item.event}.delta"
        logprobs: dict[str, Any] = {"logprobs": []} if isinstance(item, MessageItem) else {}
        head = orjson.dumps({"type": kind, **_place(item), **logprobs})
        self._delta_head = b'event: %b\ndata: %b,"delta":' % (kind.encode(), head[:-1])
        events = self.event(
            "response.output_item.added", output_index=item.output_index, item=item.as_json("in_progress")
        )
        if not isinstance(item, CallItem):
            events += self.event("response.content_part.added", **_place(item), part=item.part(is_empty=True))
        return events


def _place(item: Item) -> dict[str, Any]:
    """Where in the output, for events of an item's text."""
    place: dict[str, Any] = {"item_id": item.item_id, "output_index": item.output_index}
    return place if isinstance(item, CallItem) else {**place, "content_index": 0}
