"""Text that must match a grammar: compiled beside the engine, followed token by token, applied as masks of tokens.

    Grammar ──compile, on a thread──▶ Matcher ──one a sequence──▶ GrammarFollower ──masks──▶ sampler

Everything a follower knows comes from the grammar and the tokens generated so far: another server makes the same one.
"""
