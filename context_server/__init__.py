"""The context server: computes prompts, samples their first token, and offers their KV blocks to whoever decodes."""
