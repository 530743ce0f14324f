"""HTTP in OpenAI's shapes: bodies are checked and tokenized here, tokens become text and server-sent events here.

body ──fields──▶ GenerationFields ──prompts──▶ token ids ──dispatch──▶ token ids ──ChoiceText──▶ answer or stream
"""
