"""A chat from its fields, in the two steps in which requests read theirs."""

from __future__ import annotations

from disaggregated.grammar import Grammar
from orchestrator.api.chat import Chat, read_chat_form, read_messages
from orchestrator.api.fields import Fields
from orchestrator.parsers.formats import ReplyFormats
from orchestrator.served_model import ServedModel


async def read_chat(
    fields: Fields, model: ServedModel, formats: ReplyFormats, *, grammar: Grammar | None, allows_template: bool
) -> Chat:
    form = await read_chat_form(fields, grammar=grammar, allows_template=allows_template)
    return await read_messages(form, fields, model, formats)
