"""``gale chat`` and ``gale complete``: terminal clients for any OpenAI-style server."""
