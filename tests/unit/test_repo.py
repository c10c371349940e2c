"""The repository says the truth about itself: documents, packaging and code agree."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import server
from server.api.schemas.base import Unsupported
from server.api.schemas.chat import ChatCompletionRequest
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.generation import GenerationFields
from server.metrics import EngineCollector, HttpMetrics
from server.settings import Settings
from tests.made_up import engine_stats
from tests.ops.observed import alert_queries, metric_names, panel_queries

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(REPOSITORY.glob("*.md"))
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
README = (REPOSITORY / "README.md").read_text()


def tracked_files() -> list[Path]:
    """Every file of the repository that is, or is about to be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def section(document: str, title: str) -> str:
    """The text of a document under a heading, up to the next heading of the same or a higher level."""
    heading = re.search(rf"^(#+) {re.escape(title)}\n", document, re.MULTILINE)
    assert heading, f"no section {title!r}"
    rest = document[heading.end() :]
    following = re.search(rf"^#{{1,{len(heading.group(1))}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def first_column(text: str) -> list[str]:
    """The code words in the first cells of all table rows, in order."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return [word for cell in cells for word in re.findall(r"`([^`]*)`", cell)]


# The README's tables.


def flag_row(name: str, field: FieldInfo) -> str:
    """How the README lists a setting."""
    default = f"`{field.default}`" if field.default not in (None, ()) else ""
    if field.annotation is bool:
        default = "off"
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    description = field.description or ""
    if extra["env"] is not None:
        description += f" Environment: `{extra['env']}`."
    return f"| `--{name.replace('_', '-')}` | {default} | {description} |"


def test_readme_lists_every_flag() -> None:
    rows = [flag_row(name, field) for name, field in Settings.model_fields.items()]
    listed = [line for line in section(README, "Flags").splitlines() if line.startswith("| `--")]
    assert listed == rows, "the table should be:\n" + "\n".join(rows)


def served_fields(schema: type[BaseModel]) -> set[str]:
    """The fields of a request that are not there to be refused."""
    return {
        name
        for name, field in schema.model_fields.items()
        if not any(isinstance(mark, Unsupported) for mark in field.metadata)
    }


def test_readme_lists_every_request_field() -> None:
    assert sorted(first_column(section(README, "Request fields"))) == sorted(served_fields(CompletionRequest))
    own = served_fields(ChatCompletionRequest) - served_fields(GenerationFields)
    assert sorted(first_column(section(README, "Chat completions"))) == sorted(own)


def test_readme_lists_every_metric() -> None:
    stats = engine_stats()
    served = []
    registry = CollectorRegistry()
    HttpMetrics().register(registry)
    engine = EngineCollector(lambda: stats, lambda: True, lambda: False, lambda: 0, lambda: 0).collect()
    for metric in (*engine, *registry.collect()):
        served.append(f"{metric.name}_total" if metric.type == "counter" else metric.name)
    assert first_column(section(README, "Metrics")) == served


def test_dashboard_and_alerts_ask_for_metrics_that_there_are() -> None:
    listed = set(first_column(section(README, "Metrics")))
    for query in (*chain(*panel_queries().values()), *alert_queries().values()):
        for name in metric_names(query):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in listed, f"{name} in {query}"


def test_documents_name_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`?\bmake ([a-z-]+)`", document.read_text()):
            assert target in targets, f"{document.name}: make {target}"


# Links and names.


def heading_anchors(document: Path) -> set[str]:
    """The anchors that a Markdown viewer gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in heading_anchors(target), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(document: Path) -> None:
    top = {path.name for path in REPOSITORY.iterdir()}
    for name in re.findall(r"`([\w.-]+(?:/[\w.*-]+)+)/?`", document.read_text()):
        if name.split("/")[0] in top:
            assert list(REPOSITORY.glob(name)), f"{document.name}: {name}"


def test_tests_named_in_documents_exist() -> None:
    for document in DOCUMENTS:
        for name, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text()):
            assert f"def {test}(" in (REPOSITORY / name).read_text(), f"{document.name}: {name}::{test}"


def test_nothing_ties_the_repository_to_one_machine() -> None:
    # Written so that this file does not match itself.
    forbidden = re.compile(
        "|".join(["/wor" + "k/", "/roo" + "t/", "/hom" + r"e/(?!gale)", r"p[y]pi\.org", r"\[::1\]/simple"])
    )
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # weights, tokenizers
        for number, line in enumerate(text.splitlines(), 1):
            assert not forbidden.search(line), f"{path}:{number}: {line}"


# Packaging.


def pins() -> dict[str, str]:
    """The versions of constraints.txt, by normalized name."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(name_and_version(line) for line in lines if line and not line.startswith("#"))


def name_and_version(line: str) -> tuple[str, str]:
    """The parts of ``name==version``, the name normalized."""
    name, _, version = line.partition("==")
    return canonicalize_name(name), version


def requirements(*extras: str) -> list[Requirement]:
    """What the project declares, with the named extras."""
    project = PYPROJECT["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("requirement", requirements("test", "bench"), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_versions_looked_up_for_vulnerabilities_are_the_pinned_ones() -> None:
    page = (REPOSITORY / "tests" / "ops" / "AUDIT.md").read_text()
    looked_up = dict(re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \|", page, re.MULTILINE))
    assert {name: pins()[canonicalize_name(name)] for name in looked_up} == looked_up
    mentioned = {canonicalize_name(word) for word in re.findall(r"[\w.-]*\w", page)}
    assert pins().keys() <= mentioned


def test_this_environment_has_the_pinned_versions() -> None:
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    installed = dict(name_and_version(line) for line in frozen.splitlines() if "==" in line)
    for name, version in pins().items():
        if name in installed:
            assert SpecifierSet(f"=={version}").contains(installed[name]), name


def third_party_imports(folder: Path) -> Iterator[str]:
    """The top-level names of others' packages that a folder's modules import; examples are for others' environments."""
    for path in folder.rglob("*.py"):
        if REPOSITORY / "clients" / "examples" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0]


def test_declared_dependencies_are_those_imported() -> None:
    ours = {"server", "clients"}
    found = {root for top in ours for root in third_party_imports(REPOSITORY / top)}
    roots = found - sys.stdlib_module_names - ours - {"matplotlib"}  # of the extra "bench"
    distributions = packages_distributions()
    imported = {canonicalize_name(distributions[root][0]) for root in roots}
    # Parts of what is declared: fastapi's own foundation, pydantic's own core.
    imported -= {"starlette", "pydantic-core"}
    assert imported == {canonicalize_name(requirement.name) for requirement in requirements()}


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] in ("Unreleased", server.__version__)
    assert server.__version__ in versions


def test_docker_context_has_what_the_dockerfile_copies() -> None:
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    allowed = set(re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    }
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)
