"""The server: OpenAI-compatible HTTP over continuous batches of states, and a page."""
