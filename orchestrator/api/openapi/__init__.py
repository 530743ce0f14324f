"""The API's description of itself: GET /openapi.json.

field tables ──fields──▶ schemas of bodies ─┐
                          schemas of answers ┴──document──▶ OpenAPI 3.1

Limits are the very constants that bodies are checked with, and a test reads every field through a recorder to see that
the description and the check agree.
"""
