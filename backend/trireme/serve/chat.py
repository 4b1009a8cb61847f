"""Chat templates: messages to prompt text, rendered as transformers' apply_chat_template does. No tokens here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trireme.core.refusal import Refusal


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; a server renders what it holds."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes HTML, which no model expects."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template in a sandbox: it comes with a checkpoint and may be anybody's. `tokens`: bos_token and the like."""

    def __init__(self, source: str, tokens: Mapping[str, str]):
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = env.from_string(source)
        self._tokens = dict(tokens)

    def render(self, messages: Any, /, *, add_generation_prompt: bool = True, **values: Any) -> str:
        """Prompt text of messages ({"role", "content", ...} each); Refusal where they or the template do not fit.

        `values` are the template's own switches (`enable_thinking`, `tools`, ...).
        """
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise Refusal("bad messages", why="a chat is a list of at least one message", fix='send [{"role": "user", "content": "Hello"}]')
        named = [{key: value for key, value in message.items() if value is not None} for message in messages]
        defaults: dict[str, Any] = {"tools": None, "documents": None, **self._tokens}
        try:
            return self._template.render({**defaults, **values, "messages": named, "add_generation_prompt": add_generation_prompt})
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise Refusal("the chat template refuses these messages", why=str(error), fix="use the roles and content it knows") from None
