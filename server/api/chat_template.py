"""Chat templates: from messages to the text of a prompt, by the checkpoint's or the operator's Jinja template.

A template is code that came with a checkpoint. It runs in Jinja's sandbox, with bounds of our own on its time, on what
it writes and on the values it makes by repeating and joining; what one call of a string's method or of a filter
allocates is not bounded. The names a template finds are those that transformers gives it.
"""

import json
import re
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from server.errors import CheckpointError, InvalidRequestError, SettingsError
from server.jsonfile import read_json_object

MAX_SECONDS: Final = 2.0
"""Processor time that one rendering may take."""
MAX_CHARACTERS: Final = 1 << 26
"""Most characters of a rendered prompt, and of a text or list that a template makes on the way."""

_MAX_INT_BITS: Final = 4096
_BUDGET: Final = "gale_budget"
_WIDE_FORMAT: Final = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")
OWN_VARIABLES: Final = frozenset({"messages", "add_generation_prompt", "tools", "documents"})
"""Names of which a template gets the values from elsewhere than ``chat_template_kwargs``."""


class _Excess(Exception):
    """A bound was passed; the text says which."""


class _Budget:
    """What one rendering may still spend. Templates are compiled to ask it at every turn."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_SECONDS

    def __call__(self) -> str:
        if time.thread_time() > self._deadline:
            raise _Excess(f"it takes longer than {MAX_SECONDS:g} seconds")
        return ""

    def join(self, *parts: object) -> str:
        """What the operator ``~`` makes of its operands."""
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)


class _Instrumentation(NodeTransformer):
    """Puts a question to the budget into every loop and macro, and lets it do all joining."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._tick(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._tick(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._tick(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.Getattr(nodes.Name(_BUDGET, "load"), "join", "load")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)

    def _tick(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name(_BUDGET, "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        return node


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's own words for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the names that chat templates expect."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag], cache_size=0
        )
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _to_json

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result may be much larger than its operands."""
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise _Excess("it formats with a width of more than four digits")
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for repeated, count in ((left, right), (right, left)):
        if isinstance(repeated, str | list | tuple) and isinstance(count, int):
            _check_size(len(repeated) * count)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise _Excess(f"it makes more than {MAX_CHARACTERS} characters")


def _check_bits(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        raise _Excess(f"it computes a number of more than {_MAX_INT_BITS} bits")


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template. Safe to render from several threads.

    Args:
        source: Jinja.
        special_tokens: texts of named tokens (``bos_token``, ...), which templates write where they belong.

    Raises:
        CheckpointError: it is not valid Jinja; says where.

    Attributes:
        source: as given.
        reads_documents: whether the template does anything with documents.
        variables: names that the template reads and does not set itself: what ``chat_template_kwargs`` may set.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = _Environment()
        try:
            tree = environment.parse(source)
            unset = meta.find_undeclared_variables(tree) - environment.globals.keys()
            self._takes_parts = _takes_parts(tree)
            self._template = environment.from_string(_Instrumentation().visit(tree))
        except TemplateSyntaxError as error:
            raise CheckpointError(f"line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise CheckpointError("it is nested too deeply") from None
        self.reads_documents = "documents" in unset
        self.variables = frozenset(unset) - OWN_VARIABLES

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the prompt, special tokens written out.

        Args:
            messages: ``role``, ``content`` (a text, or a list of parts ``{"type": "text", "text": ...}``) and what
                else a template may read; at least one.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end within the last message, right behind its content.
            documents: texts to draw on.
            variables: further names for the template.

        Raises:
            InvalidRequestError: the template refuses these messages, fails on them, or passes a bound.
        """
        messages = [message | {"content": self._content(message["content"])} for message in messages]
        mark = uuid.uuid4().hex
        if continue_final_message:
            messages[-1]["content"] = _marked(messages[-1]["content"], mark)
        context = {
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": documents,
            **(variables or {}),
            _BUDGET: _Budget(),
        }
        rendered = self._run(context)
        if not continue_final_message:
            return rendered
        end = rendered.rfind(mark)
        if end < 0:
            raise InvalidRequestError(
                "Invalid 'continue_final_message': the chat template does not show the content of the last message.",
                param="continue_final_message",
            )
        return rendered[:end]

    def _run(self, context: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(context):
                size += len(piece)
                _check_size(size)
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()  # a template may write half a character, which no tokenizer takes
        except MemoryError:
            raise
        except Exception as error:  # a template may fail in any way that Python code can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidRequestError(
                f"Invalid 'messages': the chat template cannot render them: {reason[:400]}", param="messages"
            ) from None
        return text

    def _content(self, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        """The content in the form that the template expects."""
        match self._takes_parts:
            case "never" if not isinstance(content, str):
                return "\n".join(part["text"] for part in content)
            case "always" if isinstance(content, str):
                return [{"type": "text", "text": content}]
        return content


def _marked(content: str | list[dict[str, str]], mark: str) -> str | list[dict[str, str]]:
    """The content with the mark behind its text."""
    if isinstance(content, str):
        return content + mark
    return [*content[:-1], content[-1] | {"text": content[-1]["text"] + mark}]


def _takes_parts(tree: nodes.Template) -> Literal["always", "never", "also"]:
    """Whether messages' contents are lists of parts for a template: ``always``, ``never``, or ``also``.

    A template that loops over contents takes parts; if it also asks whether something is a string, it takes both.
    """
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, frozenset()):
            names.add(assignment.target.name)
    if not any(_is_content(loop.iter, frozenset(names)) for loop in tree.find_all(nodes.For)):
        return "never"
    return "also" if any(test.name == "string" for test in tree.find_all(nodes.Test)) else "always"


def _is_content(node: nodes.Node, names: frozenset[str]) -> bool:
    """Whether an expression is ``x.content``, ``x["content"]`` or one of these names, filtered or not."""
    match node:
        case nodes.Filter(node=nodes.Node() as inner):
            return _is_content(inner, names)
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in names
    return False


def load_chat_template(given: str | None, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template to serve with.

    Args:
        given: ``--chat-template``: a file, the name of one of the checkpoint's templates, or the template itself;
            None: the checkpoint's own.
        folder: where the tokenizer lies: ``chat_template.jinja``, ``tokenizer_config.json``, ``chat_template.json``.
        special_tokens: see :class:`ChatTemplate`.

    Returns:
        None if there is none.

    Raises:
        SettingsError: what was given is none of the three, or no valid template.
        CheckpointError: the checkpoint's template is not valid; names the file.
    """
    named = _templates_of(folder)
    if given is not None:
        return _given_template(given, named, special_tokens)
    if "default" not in named:
        return None
    origin, source = named["default"]
    try:
        return ChatTemplate(source, special_tokens)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: chat template: {error}; give another with --chat-template") from None


def _given_template(
    given: str, named: Mapping[str, tuple[Path, str]], special_tokens: Mapping[str, str]
) -> ChatTemplate:
    is_text = "{" in given
    if not is_text and (path := Path(given).expanduser()).is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--chat-template: {path}: {error}") from None
    elif given in named:
        source = named[given][1]
    elif is_text:
        source = given
    else:
        names = f" ({', '.join(map(repr, named))})" if named else ""
        raise SettingsError(
            f"--chat-template: {given!r} is no file, no template of the checkpoint{names}, and no Jinja"
        )
    try:
        return ChatTemplate(source, special_tokens)
    except CheckpointError as error:
        raise SettingsError(f"--chat-template: {error}") from None


def _templates_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """The checkpoint's templates by name, each with its file; that which goes first has the name."""
    found: dict[str, tuple[Path, str]] = {}
    if (path := folder / "chat_template.jinja").is_file():
        try:
            found["default"] = (path, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = (read_json_object(path) if path.is_file() else {}).get("chat_template")
        for name, source in _named_sources(path, value):
            found.setdefault(name, (path, source))
    return found


def _named_sources(path: Path, value: Any) -> list[tuple[str, str]]:
    """``chat_template`` of a JSON file: a text, or a list of objects with name and template."""
    match value:
        case None:
            return []
        case str():
            return [("default", value)]
        case list() if all(isinstance(item, dict) for item in value):
            pairs = [(item.get("name"), item.get("template")) for item in value]
            if all(isinstance(name, str) and isinstance(source, str) for name, source in pairs):
                return pairs
    raise CheckpointError(f"{path}: chat_template: must be a text, or a list of objects with 'name' and 'template'")
