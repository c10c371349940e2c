"""The playground's page: open to all, complete in itself, and in the wheel."""

import re
from pathlib import Path

import pytest

import server.api
from tests.api.scripted import serve

STATIC = Path(server.api.__file__).parent / "static"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/playground.css", "text/css"),
        ("/playground.js", "text/javascript"),
        ("/states.js", "text/javascript"),
    ],
)
def test_the_page_needs_no_key(path: str, kind: str) -> None:
    with serve(keys=("sesame",)) as running:
        answer = running.http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert running.http.get("/v1/models").status_code == 401
    assert "http://" not in answer.text and "https://" not in answer.text


def test_the_page_names_files_that_there_are() -> None:
    page = (STATIC / "index.html").read_text()
    names = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', page)
    assert names and all((STATIC / name).is_file() for name in names)


def test_the_scripts_find_their_elements() -> None:
    page = (STATIC / "index.html").read_text()
    script = "".join(path.read_text() for path in STATIC.glob("*.js"))
    wanted = set(re.findall(r'byId\("(\w+)"\)', script))
    for names in re.findall(r"\[([^\]]*)\]\.map\(byId\)", script):
        wanted |= set(re.findall(r'"(\w+)"', names))
    assert {"text", "tree", "card"} <= wanted <= set(re.findall(r'id="([\w-]+)"', page))
