"""What a grammar library lets a reply be, byte by byte."""

from __future__ import annotations

import llguidance

from disaggregated.grammar import Grammar
from disaggregated.structured.grammar_text import to_llguidance


def is_followed(grammar: Grammar, reply: str) -> bool:
    """Whether the reply is one of the grammar, and may end where it does."""
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), to_llguidance(grammar))
    assert not matcher.get_error(), matcher.get_error()
    tokens = list(reply.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


PATCH_GRAMMAR = """
// What a coding agent's patch looks like.
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?
filename: /(.+)/
add_line: "+" /(.*)/ LF -> line
change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
PATCH = '*** Begin Patch\n*** Add File: say "hi".py\n+print("ü\\n")\n+\n*** Delete File: b/c.py\n*** End Patch\n'
NO_PATCHES = ("", "x", PATCH.replace("Begin", "begin"), PATCH.replace("\n+", "\n", 1), PATCH + "x", PATCH[:40])
EXPRESSION_GRAMMAR = 'start: expr\nexpr: NUMBER | "(" expr ("+" | "*") expr ")"\nNUMBER: /[0-9]+/\n'
"""Recursive."""
