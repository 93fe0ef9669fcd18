"""Chat templates: messages to the text, and the token ids, that a model was trained to answer."""

import dataclasses
import datetime
import functools
import pathlib
from collections.abc import Mapping, Sequence

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file, read_text
from oaif_jax.data import rendering
from oaif_jax.data.joining import continuation_ids
from oaif_jax.data.special_tokens import CONFIG, read_json
from oaif_jax.data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
MOST_BYTES = 10**6  # of a template's file; the longest of released models have some ten thousand
DATE = datetime.date(2024, 7, 26)  # what templates are told is today, so that a run's prompts are the same on any day
ROLES = ("system", "user", "assistant")
LABELS = {"user": "Human", "assistant": "Assistant"}  # as in the files of Anthropic HH
MARK = "\ufdd1"  # a noncharacter: in no text, and to no template's liking or dislike
CUTS = tuple(chr(code) for code in range(0xFDD2, 0xFDF0))

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, or (source "") the plain format.

    The plain format, for models that know no chat: a single user message is its text and nothing else; several messages
    are a transcript, "\\n\\nHuman: ...\\n\\nAssistant: ...", that ends in "\\n\\nAssistant:" where an answer is wanted.

    Where a template has no system role (it raises, or leaves the text out), and in the plain format, the system message's
    text is put before the first user message's, an empty line between them.

    path: for error messages; named: texts of bos_token and the like; date: what strftime_now says; is_ours: it comes with this
    package, others are strangers' programs and have bounds in time and memory (see rendering).
    """

    path: pathlib.Path
    source: str
    named: tuple[tuple[str, str], ...] = ()
    date: datetime.date = DATE
    is_ours: bool = False

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The text of messages; by default up to where the assistant's answer begins.

        UserError: no messages, an unknown role, a system message that isn't the first, a template that fails.
        """
        check(messages)
        if messages[0]["role"] == "system" and not (self.source and self.has_system_role):
            messages = without_system(messages)
        return self._text(messages, add_generation_prompt) if self.source else plain(messages, add_generation_prompt)

    def prompt_ids(self, tokenizer: Tokenizer, messages: Messages) -> list[int]:
        """Token ids of messages, up to where the assistant's answer begins.

        The template's special tokens are read, those in the messages' own text are not: there they are ordinary text (cut
        behind their first character). BOS is there if the template writes it, once even if it writes it twice; the
        plain format has it if the tokenizer has one and adds it to texts.
        """
        if not self.source:
            bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
            return bos + tokenizer.encode(self.render(messages))
        check(messages)
        contents = "".join(message["content"] for message in messages)
        cut = next(character for character in CUTS if character not in contents)
        safe = [{**each, "content": cut.join(tokenizer.ordinary_parts(each["content"]))} for each in messages]
        first, *others = self.render(safe).split(cut)
        ids = tokenizer.encode(first, special=True)
        ids += [i for part in others for i in continuation_ids(tokenizer, part, special=True)]
        doubled = tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2
        return ids[1:] if doubled else ids

    def turn_end(self, tokenizer: Tokenizer) -> int | None:
        """The special token that the template writes behind an assistant's answer: a stop id, though not every model's
        files name it as one. None if it writes none there."""
        if not self.source:
            return None
        text = self.render(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}], add_generation_prompt=False
        )
        behind = tokenizer.encode(text.partition(MARK)[2], special=True)
        return behind[0] if behind and behind[0] in tokenizer.special_ids else None

    @functools.cached_property
    def has_system_role(self) -> bool:
        """Whether a system message's text gets into the rendered one."""
        try:
            return MARK in self._text([{"role": "system", "content": MARK}, {"role": "user", "content": "x"}], True)
        except UserError:
            return False  # whatever else is wrong with it, it says again without the system message

    def _text(self, messages: Messages, add_generation_prompt: bool) -> str:
        variables = {
            **dict(self.named),
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            render = rendering.render_here if self.is_ours else rendering.render
            return render(self.source, self.date, variables)
        except rendering.RenderError as error:
            where = f" (line {error.line})" if error.line is not None else ""
            raise UserError(f"chat template {self.path} fails{where}: {error}") from error


def open_template(tokenizer: Tokenizer, template: str = "auto", date: datetime.date = DATE) -> ChatTemplate:
    """The chat template for a tokenizer, tried on one message.

    template: "auto" is the tokenizer's own (chat_template.jinja beside it, else chat_template in tokenizer_config.json),
    and an error if it has none; "none" is the plain format; else the path of a .jinja file.
    """
    if template == "none":
        return ChatTemplate(tokenizer.path, "", date=date)
    path, source = _own(tokenizer.path.parent) if template == "auto" else (pathlib.Path(template), None)
    if source is None:
        source = _read(path)
    if len(source) > MOST_BYTES:
        raise UserError(f"chat template {path} has {len(source):,} characters, wanted at most {MOST_BYTES:,}")
    if not source.strip():
        raise UserError(f"chat template {path} is empty; template=none is the plain format")
    found = ChatTemplate(path, source, tuple(sorted(tokenizer.named.items())), date)
    if MARK not in found.render([{"role": "user", "content": MARK}]):
        raise UserError(f"chat template {path} leaves out what the user says, wanted it in every prompt")
    return found


def check(messages: Messages) -> None:
    """Messages that a template can be given."""
    if not messages:
        raise UserError("a chat has no messages, wanted at least one")
    for number, message in enumerate(messages):
        if not {"role", "content"} <= set(message) or message["role"] not in ROLES:
            raise UserError(f"message {number} is {dict(message)!r}, wanted content and a role of {', '.join(ROLES)}")
    late = [number for number, message in enumerate(messages) if number and message["role"] == "system"]
    if late:
        raise UserError(f"message {late[0]} is the system's, wanted it first")


def without_system(messages: Messages) -> list[dict[str, str]]:
    """The system message's text before the first user message's, an empty line between them."""
    system, *others = (dict(message) for message in messages)
    users = [message for message in others if message["role"] == "user"]
    if not users:
        raise UserError("a chat has a system message and no user's, wanted one to put its text before")
    users[0]["content"] = f"{system['content']}\n\n{users[0]['content']}"
    return others


def plain(messages: Messages, add_generation_prompt: bool) -> str:
    """The plain format, see ChatTemplate."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    text = "".join(f"\n\n{LABELS[message['role']]}: {message['content']}" for message in messages)
    return f"{text}\n\n{LABELS['assistant']}:" if add_generation_prompt else text


def _own(directory: pathlib.Path) -> tuple[pathlib.Path, str | None]:
    """The file of a tokenizer's template, and its text unless it is the whole file."""
    if is_file(directory / TEMPLATE_FILE):
        return directory / TEMPLATE_FILE, None
    path = directory / CONFIG
    found = read_json(path).get("chat_template")
    if found is None:
        raise UserError(
            f"tokenizer {directory} has no chat template, wanted {TEMPLATE_FILE} or chat_template in {CONFIG};"
            " template=none is the plain format, or give the path of a .jinja file"
        )
    if isinstance(found, list):
        found = _default(path, found)
    if not isinstance(found, str):
        raise UserError(
            f"{path}: chat_template is a JSON {type(found).__name__}, wanted a text or a list of named ones"
        )
    return path, found


def _default(path: pathlib.Path, templates: list) -> str:
    """The template named "default" of [{"name": ..., "template": ...}, ...]"""
    if not all(isinstance(each, dict) and {"name", "template"} <= set(each) for each in templates):
        raise UserError(f"{path}: chat_template is a list of other things, wanted objects with name and template")
    named = {str(each["name"]): each["template"] for each in templates}
    if not isinstance(named.get("default"), str):
        raise UserError(f"{path}: chat_template has {', '.join(named) or 'none'}, wanted one named default")
    return named["default"]


def _read(path: pathlib.Path) -> str:
    if not is_file(path):
        raise UserError(f"chat template {path}: no such file, wanted auto, none or the path of a .jinja file")
    try:
        return read_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {path} can't be read ({error}), wanted UTF-8") from error
