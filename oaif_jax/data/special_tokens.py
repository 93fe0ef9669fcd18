"""Which tokens of a tokenizer have a meaning, read from the JSON files that lie beside it."""

import dataclasses
import json
import pathlib

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file, read_bytes

CONFIG, MAP, GENERATION, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "added_tokens.json",
)

MOST_BYTES = 10**8  # of a file: those of vocabularies of a million have tens of millions

Json = dict[str, object]


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that the files give an id; `strips` where it takes the spaces beside it, or asks for a word's end."""

    text: str
    id: int
    special: bool
    strips: bool


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """What the files say; empty and None where they say nothing.

    named: pairs such as ("bos_token", "<s>"). extra: other texts with a meaning. added: tokens with their ids.
    stop_ids, bos_id, pad_id: of generation_config.json, the latter two where no token is named for them.
    adds_bos: whether a text begins with BOS.
    """

    named: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()
    added: tuple[AddedToken, ...] = ()
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    adds_bos: bool | None = None

    def text(self, name: str) -> str | None:
        """The text of a named token, such as eos_token."""
        return dict(self.named).get(name)


NOTHING = SpecialTokens()


def read(directory: pathlib.Path) -> SpecialTokens:
    """What tokenizer_config.json, special_tokens_map.json, added_tokens.json and generation_config.json say; the first
    two in this order, and each may be missing."""
    config, tokens = read_json(directory / CONFIG), read_json(directory / MAP)
    generation, added = read_json(directory / GENERATION), read_json(directory / ADDED)
    adds_bos = config.get("add_bos_token")
    if not (adds_bos is None or isinstance(adds_bos, bool)):
        raise UserError(f"{directory / CONFIG}: add_bos_token={adds_bos!r}, wanted true or false")
    named = _named(directory / MAP, tokens) | _named(directory / CONFIG, config)
    return SpecialTokens(
        tuple(sorted(named.items())),
        (*_extra(directory / CONFIG, config), *_extra(directory / MAP, tokens)),
        (*_decoder(directory / CONFIG, config), *_plainly_added(directory / ADDED, added)),
        _ids(directory / GENERATION, generation, "eos_token_id"),
        None if "bos_token" in named else next(iter(_ids(directory / GENERATION, generation, "bos_token_id")), None),
        None if "pad_token" in named else next(iter(_ids(directory / GENERATION, generation, "pad_token_id")), None),
        adds_bos,
    )


def read_json(path: pathlib.Path) -> Json:
    """The object of a JSON file; {} if there is no such file."""
    if not is_file(path):
        return {}
    try:
        found = json.loads(read_bytes(path, MOST_BYTES))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} can't be read ({error}), wanted JSON") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON {type(found).__name__}, wanted an object")
    return found


def _token_text(path: pathlib.Path, name: str, value: object) -> str:
    """ "<s>" from "<s>" or {"content": "<s>", ...}"""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}: {name}={value!r}, wanted the token's text")
    return text


def _named(path: pathlib.Path, found: Json) -> dict[str, str]:
    """bos_token, eos_token, pad_token, unk_token and what else is named so; null is none."""
    tokens = {
        name: value
        for name, value in found.items()
        if name.endswith("_token") and not name.startswith("add_") and isinstance(value, str | dict)
    }
    wrong = [name for name in ("bos_token", "eos_token", "pad_token") if name in found and name not in tokens]
    for name in wrong:
        if found[name] is not None:
            raise UserError(f"{path}: {name}={found[name]!r}, wanted the token's text")
    return {name: _token_text(path, name, value) for name, value in tokens.items()}


def _extra(path: pathlib.Path, found: Json) -> list[str]:
    """additional_special_tokens, a list; extra_special_tokens, its newer name, a list or texts by name."""
    texts = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = found.get(name) or []
        values = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise UserError(f"{path}: {name}={value!r}, wanted a list of texts")
        texts += [_token_text(path, name, each) for each in values]
    return texts


def _decoder(path: pathlib.Path, found: Json) -> list[AddedToken]:
    """added_tokens_decoder: {"32000": {"content": "<|end|>", "special": true, ...}}"""
    decoder = found.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(
        number.isdecimal() and isinstance(token, dict) for number, token in decoder.items()
    ):
        raise UserError(f"{path}: added_tokens_decoder isn't what it should be, wanted tokens by id")
    strips = lambda token: any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))  # noqa: E731
    return [
        AddedToken(_token_text(path, number, token), int(number), bool(token.get("special")), strips(token))
        for number, token in decoder.items()
    ]


def _plainly_added(path: pathlib.Path, found: Json) -> list[AddedToken]:
    """added_tokens.json: {"<pad>": 32000}; that they are special is said elsewhere."""
    for text, number in found.items():
        if type(number) is not int:
            raise UserError(f"{path}: {text!r} is {number!r}, wanted its id")
    return [AddedToken(text, number, False, False) for text, number in found.items() if isinstance(number, int)]


def _ids(path: pathlib.Path, found: Json, name: str) -> tuple[int, ...]:
    """One id or a list of them; none if nothing is said."""
    value = found.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(each for each in values if isinstance(each, int) and not isinstance(each, bool) and each >= 0)
    if len(ids) < len(values):
        raise UserError(f"{path}: {name}={value!r}, wanted an id or a list of ids")
    return ids
