"""``make audit``, up to where a database answers: every pin is asked about, and without an answer nothing passes.

The database is a stand-in that speaks OSV's protocol. Needs a package index, for pip-audit.
"""

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.ops

REPOSITORY = Path(__file__).parents[2]
PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
}


class Database(ThreadingHTTPServer):
    """Knows of vulnerabilities of some versions, and remembers what it was asked."""

    def __init__(self, vulnerable: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.vulnerable = vulnerable
        self.asked: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/query"


class Handler(BaseHTTPRequestHandler):
    server: Database

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package, version = query["package"], query["version"]
        self.server.asked[package["name"]] = version
        answer = {}
        if self.server.vulnerable.get(package["name"]) == version:
            answer = {"vulns": [{"id": "PYSEC-0000-1", "affected": [{"package": package, "versions": [version]}]}]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``make audit`` makes its environment, at the first test that runs it."""
    return tmp_path_factory.mktemp("audit") / "venv"


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    database = Database(request.param)
    thread = threading.Thread(target=database.serve_forever)
    thread.start()
    yield database
    database.shutdown()
    thread.join()
    database.server_close()


def audit(venv: Path, url: str) -> tuple[int, str]:
    """Exit code and output."""
    arguments = ["make", "audit", f"AUDIT_VENV={venv}", f"ARGS=-s osv --osv-url {url}"]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("database", [{}], indirect=True)
def test_every_pin_is_asked_about(venv: Path, database: Database) -> None:
    code, output = audit(venv, database.url)
    assert (code, database.asked) == (0, PINS), output
    assert "No known vulnerabilities found" in output


@pytest.mark.parametrize("database", [{"starlette": PINS["starlette"]}], indirect=True)
def test_a_pin_with_a_known_vulnerability_does_not_pass(venv: Path, database: Database) -> None:
    code, output = audit(venv, database.url)
    assert code != 0
    assert re.search(rf"^starlette\s+{re.escape(PINS['starlette'])}\s+PYSEC-0000-1", output, re.MULTILINE), output
    assert "make audit: not passed" in output


def test_without_a_database_nothing_passes(venv: Path) -> None:
    code, output = audit(venv, "http://127.0.0.1:9/v1/query")
    assert code != 0
    assert "the database could not be asked about every pin" in output
