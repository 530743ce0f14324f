"""Text lives here and nowhere else: servers speak token ids.

messages ──ChatTemplate──▶ prompt ──Tokenizer──▶ ids ──servers──▶ ids ──Detokenizer──▶ text ──StopStrings──▶ client
"""

from orchestrator.text.chat_template import ChatTemplate
from orchestrator.text.detokenizer import Detokenizer
from orchestrator.text.stop_strings import StopStrings
from orchestrator.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopStrings", "Tokenizer"]
