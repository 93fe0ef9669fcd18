"""The data that a config names: the tiny world, or texts from files in the policy's voice."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from oaif_jax import start
from oaif_jax.annotate import prompts
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data import readers, records
from oaif_jax.data.chat import open_template
from oaif_jax.data.records import Counts, Example
from oaif_jax.data.source import Questions, Source
from oaif_jax.data.texts import TextData, TextQuestions, Voice
from oaif_jax.stored import hf
from oaif_jax.tiny.data import TinyData, instruction_text

JOINED = 200  # examples whose prompts and responses are tokenized as one text, to say how often that differs
USES = {"online": "prompts", "offline": "pairs", "sft": "references"}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A policy's data, the ids that end its responses, and what there is to say about what was read."""

    source: Source
    stop_ids: tuple[int, ...]
    train_size: int
    notes: tuple[str, ...] = ()


def prepare(cfg: Config) -> Prepared:
    """Reads and checks all data of a run."""
    return _tiny(cfg) if cfg.data.name == "tiny" else _texts(cfg)


def tiny_data(cfg: Config) -> TinyData:
    """The tiny world with a run's limits."""
    tokenizer = start.tokenizer_of(start.origin_of("policy", cfg.policy))
    limits = (cfg.data.prompt_tokens, cfg.data.response_tokens)
    data = TinyData(tokenizer, cfg.data.seed, *limits, cfg.data.writer)
    longest = data.longest_prompt()
    if longest > cfg.data.prompt_tokens:
        raise UserError(
            f"config.data.prompt_tokens={limits[0]}: posts have up to {longest} tokens, wanted at least that"
        )
    return data


def _tiny(cfg: Config) -> Prepared:
    if start.home(start.origin_of("policy", cfg.policy)) is not None:
        raise UserError(
            "config.data.name='tiny': the tiny world has a tokenizer of its own, wanted policy.init=tiny:NAME"
        )
    if cfg.data.train_posts < 1:
        raise UserError("config.data.train_posts=0: the tiny world has no end, wanted at least 1")
    data = tiny_data(cfg)
    return Prepared(data, data.tokenizer.stop_ids, cfg.data.train_posts)


def voice_of(origin: start.Origin, chat: str) -> Voice:
    """The voice of a model from a Hugging Face directory."""
    directory = start.home(origin)
    if directory is None:
        raise UserError(
            f"{origin}: wanted init=hf and path=DIRECTORY, or a run that began with one, for data from files"
        )
    tokenizer = start.tokenizer_of(origin)
    template = open_template(tokenizer, chat)
    ends = [*tokenizer.stop_ids, *hf.read(directory).stop_ids]
    turn_end = template.turn_end(tokenizer)
    # What an answer in a chat ends with comes first: it is what responses from files are given.
    ends = ends if turn_end is None else [turn_end, *ends]
    return Voice(tokenizer, template, tuple(dict.fromkeys(ends)))


def _texts(cfg: Config) -> Prepared:
    if cfg.method not in USES:
        raise UserError(f"config.method={cfg.method!r} needs config.data.name='tiny', not {cfg.data.name!r}")
    if not cfg.data.path:
        raise UserError(f"config.data.path='': wanted the file or directory of config.data.name={cfg.data.name!r}")
    voice = voice_of(start.origin_of("policy", cfg.policy), cfg.policy.chat)
    data = TextData({}, voice, cfg.data.prompt_tokens, cfg.data.response_tokens)
    wanted = {"train": cfg.data.train, "validation": cfg.data.validation, "test": cfg.data.test}
    notes, splits = [], {}
    for name, split in wanted.items():
        if name == "train" or split:
            splits[name], counts = _read(cfg, data, split)
            notes.append(f"{cfg.data.path}{f' {split}' if split else ''}: {counts}")
    splits |= _hold_out(cfg, splits)
    # Pairs may have several responses to a prompt: none that is evaluated on is trained on.
    kept = {example.prompt for name in ("validation", "test") for example in splits[name]}
    train = [example for example in splits["train"] if example.prompt not in kept]
    splits["train"] = train[: cfg.data.train_posts or None]
    for name, count in (("validation", cfg.eval.prompts), (cfg.eval.final_split, cfg.eval.final_prompts)):
        if len(splits[name]) < count:
            raise UserError(f"config.data: {name} has {len(splits[name])} examples, wanted {count} for evaluations")
    if not splits["train"]:
        raise UserError(f"config.data.held_out={cfg.data.held_out}: nothing is left to train on, wanted fewer")
    if cfg.method != "online":
        notes.append(f"the first {JOINED} examples: {voice.joining(splits['train'][:JOINED])}")
    return Prepared(dataclasses.replace(data, splits=splits), voice.stop_ids, len(splits["train"]), tuple(notes))


def _read(cfg: Config, data: TextData, split: str) -> tuple[list[Example], Counts]:
    loaded = readers.read(cfg.data.name, pathlib.Path(cfg.data.path), split, cfg.data.on_error)
    loaded = records.use_as(loaded, USES[cfg.method])
    loaded = records.within(loaded, data.tokens_of, data.prompt_tokens, data.response_tokens)
    return loaded.examples, loaded.counts


def _hold_out(cfg: Config, splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Splits that weren't named, taken from train by a shuffle of the data's seed, and what is left of train."""
    missing = [name for name in ("validation", "test") if name not in splits]
    train = splits["train"]
    wanted = cfg.data.held_out * len(missing)
    if len(train) <= wanted:
        raise UserError(
            f"config.data.held_out={cfg.data.held_out}: there are {len(train)} examples, wanted more than {wanted}"
        )
    order = np.random.default_rng(cfg.data.seed).permutation(len(train))
    taken = {name: order[i * cfg.data.held_out : (i + 1) * cfg.data.held_out] for i, name in enumerate(missing)}
    found = {name: [train[i] for i in sorted(indices)] for name, indices in taken.items()}
    return found | {"train": [train[i] for i in sorted(order[wanted:])]}


SPLITS = ("train", "validation", "test")


def questions(
    cfg: Config, data: Source, origin: start.Origin, chat: str, instruction: str, splits: Sequence[str] = SPLITS
) -> Questions:
    """How the model of `origin` is asked about the data of some splits, under an instruction by name or path."""
    if isinstance(data, TinyData):
        return data.questions(instruction_text(instruction))
    assert isinstance(data, TextData), data
    return text_questions(cfg, data, origin, chat, instruction, splits)


def text_questions(
    cfg: Config, data: TextData, origin: start.Origin, chat: str, instruction: str, splits: Sequence[str] = SPLITS
) -> TextQuestions:
    """As `questions`, about texts; the limit on a question's tokens is checked, or found."""
    asked = TextQuestions(
        data, voice_of(origin, chat), prompts.read_instruction(instruction), cfg.annotator.question_tokens
    )
    _ = asked.template  # what is wrong with answers and chat is said now
    every: Sequence[Example] = [example for name in splits for example in data.splits[name]]
    tokens, longest = max(((len(asked.question(example)), example) for example in every), key=lambda both: both[0])
    if not asked.question_tokens:
        return dataclasses.replace(asked, question_tokens=-(-tokens // 8) * 8)
    if tokens > asked.question_tokens:
        raise UserError(
            f"config.annotator.question_tokens={asked.question_tokens}: the question about {longest.source} has "
            f"{tokens} tokens, wanted at least that"
        )
    return asked
