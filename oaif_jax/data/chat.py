"""Chat templates: messages to the text, and the token ids, that a model was trained to answer."""

import dataclasses
import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from oaif_jax.base.errors import UserError, near
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
ANSWER = "\ufdd2"  # as MARK, for what the assistant says
CUTS = tuple(chr(code) for code in range(0xFDD3, 0xFDF0))
GIVEN = ("messages", "add_generation_prompt", "tools", "documents")  # what every template is given by us

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}


class Turn(NamedTuple):
    """Token ids of an assistant's turn: of the prompt, of the answer behind it, and of both tokenized as one text."""

    prompt: list[int]
    answer: list[int]
    whole: list[int]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, or (source "") the plain format.

    The plain format, for models that know no chat: several messages are a transcript, "\\n\\nHuman: ...\\n\\nAssistant: ...",
    that ends in "\\n\\nAssistant:" where an answer is wanted, and with `cues` so is a single one; without them a single user
    message is its text and nothing else.

    Where a template has no system role (it raises, or leaves the text out), and in the plain format, the system message's
    text is put before the first user message's, an empty line between them.

    path: for error messages; named: texts of bos_token and the like; date: what strftime_now says; arguments: values of
    other names that the template reads, such as enable_thinking; is_ours: it comes with this package, others are strangers'
    programs and have bounds in time and memory (see rendering).
    """

    path: pathlib.Path
    source: str
    named: tuple[tuple[str, str], ...] = ()
    date: datetime.date = DATE
    arguments: tuple[tuple[str, object], ...] = ()
    is_ours: bool = False

    def render(self, messages: Messages, *, add_generation_prompt: bool = True, cues: bool = False) -> str:
        """The text of messages; by default up to where the assistant's answer begins.

        UserError: no messages, an unknown role, a system message that isn't the first, a template that fails.
        """
        check(messages)
        if messages[0]["role"] == "system" and not (self.source and self.has_system_role):
            messages = without_system(messages)
        if self.source:
            return self._text(messages, add_generation_prompt)
        return plain(messages, add_generation_prompt, cues=cues)

    def prompt_ids(self, tokenizer: Tokenizer, messages: Messages, *, cues: bool = False) -> list[int]:
        """Token ids of messages, up to where the assistant's answer begins.

        The template's special tokens are read, those in the messages' own text are not: there they are ordinary text (cut
        behind their first character). BOS is there if the template writes it, once even if it writes it twice; the
        plain format has it if the tokenizer has one and adds it to texts.
        """
        if not self.source:
            return tokenizer.begin + tokenizer.encode(self.render(messages, cues=cues))
        check(messages)
        safe, cut = without_special(tokenizer, messages)
        return read_ids(tokenizer, self.render(safe), cut)

    def turn(self, tokenizer: Tokenizer, messages: Messages, answer: str, *, stop: bool) -> "Turn | None":
        """An answer as the template's assistant turn has it: of prompt and answer rendered together, what isn't the prompt's.
        With `stop` up to the special token behind the answer, where the template writes one.

        Where a token lies across the end of the prompt, the turn's text is tokenized by itself: the prompt's ids are what the
        model is given when it writes. None where the template has no assistant's turn, or none that goes on from its prompt.
        """
        if not self.source or not self.has_answers:
            return None
        # Some templates write what comes first otherwise once the chat has an answer: there the turn is a short chat's.
        for chat in (messages, [{"role": "user", "content": "x"}]):
            safe, cut = without_special(tokenizer, [*chat, {"role": "assistant", "content": answer}])
            prompt, whole = self.render(safe[:-1]), self.render(safe, add_generation_prompt=False)
            if whole.startswith(prompt) and whole.endswith(self._tail):
                whole = whole.removesuffix(self._tail) + (tokenizer.leading_control(self._tail) if stop else "")
                begin, ids = read_ids(tokenizer, prompt, cut), read_ids(tokenizer, whole, cut)
                is_clean = ids[: len(begin)] == begin
                own = ids[len(begin) :] if is_clean else continued_ids(tokenizer, whole.removeprefix(prompt), cut)
                return Turn(begin, own, ids)
        return None

    def turn_end(self, tokenizer: Tokenizer) -> int | None:
        """The special token that the template writes behind an assistant's answer, with white space before it or none: a
        stop id, though not every model's files name it as one. None if it writes none there."""
        ending = tokenizer.leading_control(self._tail).lstrip()
        return tokenizer.control[ending] if ending else None

    def framing(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """The added tokens that the template writes around a user's message, such as <|im_start|>: they have a meaning even where
        the files don't say so. White space and words that were added to a vocabulary have none."""
        if not self.source:
            return ()
        frame = self.render([{"role": "user", "content": MARK}], add_generation_prompt=False)
        is_mark = lambda text: len(text) > 2 and not (text[0].isalnum() or text[-1].isalnum() or text.isspace())  # noqa: E731
        return tuple(
            text for text in tokenizer.added if text in frame and is_mark(text) and text not in tokenizer.control
        )

    def around(self) -> tuple[str, str]:
        """The text before the one message of a user, and between it and where the answer to it begins."""
        if not self.source:
            return "", ""
        user = {"role": "user", "content": MARK}
        if not self.has_answers:
            before, _, after = self.render([user]).partition(MARK)
            return before, after
        text = self.render([user, {"role": "assistant", "content": ANSWER}], add_generation_prompt=False)
        before, _, behind = text.partition(MARK)
        return before, behind.partition(ANSWER)[0]

    @functools.cached_property
    def has_answers(self) -> bool:
        """Whether an assistant's message gets into the rendered text."""
        return ANSWER in self._answer_to_x

    @functools.cached_property
    def _answer_to_x(self) -> str:
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}]
        try:
            return self.render(chat, add_generation_prompt=False) if self.source else ""
        except UserError:  # it refuses chats that end so
            return ""

    @property
    def _tail(self) -> str:
        """The text behind an answer."""
        return self._answer_to_x.partition(ANSWER)[2]

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
            **dict(self.arguments),
        }
        try:
            render = rendering.render_here if self.is_ours else rendering.render
            return render(self.source, self.date, variables)
        except rendering.RenderError as error:
            where = f" (line {error.line})" if error.line is not None else ""
            raise UserError(f"chat template {self.path} fails{where}: {error}") from error


def open_template(
    tokenizer: Tokenizer, template: str = "auto", date: datetime.date = DATE, arguments: str = ""
) -> ChatTemplate:
    """The chat template for a tokenizer, tried on one message.

    template: "auto" is the tokenizer's own (chat_template.jinja beside it, else chat_template in tokenizer_config.json),
    and an error if it has none; "none" is the plain format; else the path of a .jinja file. arguments: NAME=VALUE,... of
    names that the template reads.
    """
    if template == "none":
        if arguments:
            raise UserError(f"arguments {arguments!r}, and the plain format reads none: wanted a chat template")
        return ChatTemplate(tokenizer.path, "", date=date)
    path, source = _own(tokenizer.path.parent) if template == "auto" else (pathlib.Path(template), None)
    if source is None:
        source = _read(path)
    if len(source) > MOST_BYTES:
        raise UserError(f"chat template {path} has {len(source):,} characters, wanted at most {MOST_BYTES:,}")
    if not source.strip():
        raise UserError(
            f"chat template {path} is empty; none (--config.policy.chat=none, annotator.chat, judge.chat) is the plain format"
        )
    found = ChatTemplate(
        path, source, tuple(sorted(tokenizer.named.items())), date, _arguments(arguments, path, source)
    )
    if MARK not in found.render([{"role": "user", "content": MARK}]):
        raise UserError(f"chat template {path} leaves out what the user says, wanted it in every prompt")
    return found


def _arguments(text: str, path: pathlib.Path, source: str) -> tuple[tuple[str, object], ...]:
    """In: "enable_thinking=false,date_string=26 Jul 2024". Out: ("enable_thinking", False), ("date_string", "26 Jul 2024").

    Values are JSON, or else texts; a name that the template doesn't read would do nothing, and is an error.
    """
    found: dict[str, object] = {}
    for each in text.split(",") if text.strip() else ():
        name, equals, value = (part.strip() for part in each.partition("="))
        if not (name.isidentifier() and equals and value):
            raise UserError(f"chat arguments {text!r}: {each!r}, wanted NAME=VALUE, such as enable_thinking=false")
        if name in found or name in GIVEN:
            reason = "is there twice" if name in found else "can't be given"
            raise UserError(f"chat arguments {text!r}: {name} {reason}, wanted other names, each once")
        known = rendering.names_read(source)
        if known is not None and name not in known - {*GIVEN}:
            raise UserError(
                f"chat arguments {text!r}: chat template {path} doesn't read {name}{near(name, known - {*GIVEN})}"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        if isinstance(found[name], list | dict):
            raise UserError(f"chat arguments {text!r}: {each!r}, wanted a text, a number, true, false or null")
    return tuple(found.items())


def without_special(tokenizer: Tokenizer, messages: Messages) -> tuple[list[dict[str, str]], str]:
    """The messages with a noncharacter wherever a special token's text is to be cut, and that noncharacter."""
    contents = "".join(message["content"] for message in messages)
    cut = next(character for character in CUTS if character not in contents)
    return [{**each, "content": cut.join(tokenizer.ordinary_parts(each["content"]))} for each in messages], cut


def read_ids(tokenizer: Tokenizer, text: str, cut: str) -> list[int]:
    """Token ids of a rendered text; its special tokens are read but where it is cut, and BOS that is doubled is one."""
    first, *others = text.split(cut)
    ids = tokenizer.encode(first, special=True)
    ids += [i for part in others for i in continuation_ids(tokenizer, part, special=True)]
    doubled = tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2
    return ids[1:] if doubled else ids


def continued_ids(tokenizer: Tokenizer, text: str, cut: str) -> list[int]:
    """The same of a text that continues another."""
    return [i for part in text.split(cut) for i in continuation_ids(tokenizer, part, special=True)]


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


def plain(messages: Messages, add_generation_prompt: bool, *, cues: bool = False) -> str:
    """The plain format, see ChatTemplate."""
    if len(messages) == 1 and messages[0]["role"] == "user" and not cues:
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
            " none (--config.policy.chat=none, annotator.chat, judge.chat) is the plain format, or give the path of a .jinja file"
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
