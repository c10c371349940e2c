"""``gale bench``: a load generator for any OpenAI-style server."""
