"""Programs that talk to an OpenAI-style server over HTTP; nothing here imports the server."""
