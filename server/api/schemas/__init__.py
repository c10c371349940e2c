"""The JSON of the OpenAI-style API: what a request may hold and what an answer holds.

Types are strict (``true`` is not 1, ``"1"`` is not 1) and unknown fields are errors. ``null`` means
"not given" everywhere. Bounds that depend on the model or the server's limits (vocabulary, context
length, number of log-probabilities) are checked in ``server.api.validation``.
"""
