"""The generation server: pulls prompts' KV blocks from context servers, or computes them, and decodes."""
