"""POST /v1/responses: OpenAI's newer API, on top of chats.

body ──input_items, tools──▶ a chat's body ──jobs──▶ tokens ──parsers──▶ deltas ──output──▶ items ──shape──▶ JSON

A body is translated to the chat that means the same and goes the way of every chat; only the answer has a shape of its
own. What `previous_response_id` refers to is kept in this process, in bounded memory.
"""
