"""The HTTP server over engines: OpenAI's API and a few routes of its own. `python -m runtime.serve` starts it."""
