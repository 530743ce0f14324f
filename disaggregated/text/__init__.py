"""Text lives here and nowhere else: servers and engine speak token ids.

messages ──ChatTemplate──▶ prompt ──Tokenizer──▶ ids ──engine──▶ ids ──Detokenizer──▶ text ──StopStrings──▶ reader
                                                                    └────────── ChoiceText does both ─────────┘
"""

from disaggregated.text.bad_words import bad_word_ids
from disaggregated.text.chat_template import ChatTemplate
from disaggregated.text.choice_text import ChoiceText
from disaggregated.text.detokenizer import Detokenizer
from disaggregated.text.stop_strings import StopStrings
from disaggregated.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "ChoiceText", "Detokenizer", "StopStrings", "Tokenizer", "bad_word_ids"]
