"""The HTTP side: an OpenAI-style API in front of the engine process. Never imports torch."""
