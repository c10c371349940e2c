"""An OpenAI-style server that plays a script, for the clients' tests."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


class Scripted(BaseHTTPRequestHandler):
    """Answers every completion with three chunks of a token each, or as its server's ``script`` says."""

    protocol_version = "HTTP/1.1"
    server: "ScriptedServer"

    def do_GET(self) -> None:
        if self.server.script == "key":
            self.server.keys.append(self.headers.get("authorization"))
            self._json(401, {"error": {"message": "no such key", "code": "invalid_api_key"}})
        elif self.path == "/v1/states" and ("states" in self.server.script or self.server.script == "forgetful"):
            self._json(200, {"data": []})
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": "scripted"}]})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("authorization"))
        script = self.server.script
        if script == "refuse":
            self._json(400, {"error": {"message": "'max_tokens' is too large"}})
            return
        chat = self.path == "/v1/chat/completions"
        chunks: list[Any] = [{"choices": [{"delta": {"role": "assistant"}}]}] if chat else []
        chunks += [{"choices": [{"delta": {"content": t}} if chat else {"text": t}]} for t in ("a", "b", "c")]
        if script == "fail":
            chunks[-1] = {"error": {"message": "the engine died"}}
        else:
            chunks.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}})
        if "states" in script and body.get("save_state"):
            chunks[-2] |= {"state": {"id": "state-1", "num_tokens": 7, "bytes": 0}}
        lines = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
        if script != "cut":
            lines.append(b"data: [DONE]\n\n")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number, line in enumerate(lines):
            if number == 2 and (script == "stall" or (script == "states, then stall" and "state" in body)):
                self.server.released.wait(60)
            self.wfile.write(line)
        self.close_connection = True

    def do_DELETE(self) -> None:
        self.server.deleted.append(self.path)
        self._json(200, {})

    def _json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class ScriptedServer(ThreadingHTTPServer):
    """Remembers what it was sent: bodies and keys of requests, and paths of what was to be deleted."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Scripted)
        self.script = ""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.deleted: list[str] = []
        self.released = Event()
        """Set to let the script "stall" go on after two tokens."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def scripted_server(port: int = 0) -> Iterator[ScriptedServer]:
    """One that runs meanwhile; on a free port, if none is given."""
    with ScriptedServer(port) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running
        finally:
            running.released.set()
            running.shutdown()
            thread.join()
