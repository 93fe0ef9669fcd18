"""The data that a config names: the tiny world, or texts from files, in the policy's voice."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file
from oaif_jax.config import Data, Eval
from oaif_jax.data import readers, records, splits
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.records import Counts, Example, Message
from oaif_jax.data.voice import Voice

JOINED = 200  # examples whose prompts and responses are tokenized as one text, to say how often that differs
CHARACTERS = 256  # of a token, at most, on the average of a text: what is longer is too long without being tokenized


def texts(section: Data, evaluation: Eval, voice: Voice, reads: str, *, portions: int = 1) -> DataSet:
    """Examples of files for what a method reads (records.USES), in splits with no prompt in common; of training examples, as many
    as divide into `portions` equal ones."""
    if not section.path:
        raise UserError(f"config.data.path='': wanted the file or directory of config.data.name={section.name!r}")
    is_file(pathlib.Path(section.path))  # what can't be looked at is said now
    if section.validation and section.validation == section.test:
        raise UserError(
            f"config.data.validation and test are both {section.test!r}, wanted two splits, or one of them ''"
        )
    data = DataSet({}, voice, section.prompt_tokens, section.response_tokens)
    named = {"train": section.train, "validation": section.validation, "test": section.test}
    keys = Keys(data)
    notes, read = [], {}
    for name, split in named.items():
        if name == "train" or split:
            read[name], counts = _read(section, keys, split, reads)
            notes.append(f"{section.path}{f' {split}' if split else ''}: {counts}")
    found, said = splits.part(
        read,
        keys.key,
        held_out=section.held_out,
        seed=section.seed,
        train_posts=section.train_posts,
        portions=portions,
    )
    wanted = (
        ("validation", "prompts", evaluation.prompts),
        (evaluation.final_split, "final_prompts", evaluation.final_prompts),
    )
    for name, key, count in wanted:
        if len(found[name]) < count:
            there = f"{name} has {len(found[name])} examples with distinct prompts"
            raise UserError(f"config.eval.{key}={count}: {there}, wanted at most that, or more data")
    if not found["train"]:
        raise UserError(f"config.data.held_out={section.held_out}: nothing is left to train on, wanted fewer")
    notes.append(said)
    if reads != "prompts":
        notes.append(f"the first {JOINED} examples: {voice.joining(found['train'][:JOINED])}")
    return dataclasses.replace(data, splits=found, notes=tuple(notes))


def has_conversations(section: Data) -> bool:
    """Whether a user's text is said in a conversation with the policies of this data, or is continued as it stands."""
    return section.name in ("hh", "ultrafeedback") or (section.name == "tfds" and "oaif_tldr" not in section.path)


def evaluated(data: DataSet, split: str, seed: int) -> DataSet:
    """The data set with what evaluations take of a split: one example to each distinct prompt, in an order of which the first n
    are a seeded sample. Validation and test are so already, and an endless split is as it is."""
    if data.is_endless or split in splits.EVALUATED:
        return data
    return dataclasses.replace(
        data, splits={**data.splits, split: splits.sample(data.splits[split], Keys(data).key, seed)}
    )


@dataclasses.dataclass
class Keys:
    """What is known of examples once they are tokenized: which prompts are the same tokens, and which pairs."""

    data: DataSet
    prompts: dict[tuple[Message, ...], bytes] = dataclasses.field(default_factory=dict)
    same: set[Example] = dataclasses.field(default_factory=set)  # pairs whose responses are the same tokens

    def key(self, example: Example) -> bytes:
        """The same for the same tokens of a prompt."""
        if example.prompt not in self.prompts:
            ids = self.data.voice.prompt(example)
            self.prompts[example.prompt] = hashlib.sha256(np.array(ids, np.int64).tobytes()).digest()
        return self.prompts[example.prompt]

    def tokens_of(self, example: Example) -> tuple[int, int]:
        """Tokens of the prompt and of the longest response, as far as these can be within the limits."""
        data = self.data
        most = CHARACTERS * data.prompt_tokens, CHARACTERS * data.response_tokens
        prompt_length = sum(len(message.content) + 1 for message in example.prompt)
        if prompt_length > most[0] or max(map(len, example.responses), default=0) > most[1]:
            return data.prompt_tokens + 1, data.response_tokens + 1
        prompt, responses = data.ids_of(example)
        self.prompts[example.prompt] = hashlib.sha256(np.array(prompt, np.int64).tobytes()).digest()
        if example.is_pair and responses[0] == responses[1]:
            self.same.add(example)
        return len(prompt), max(map(len, responses), default=0)


def _read(section: Data, keys: Keys, split: str, reads: str) -> tuple[list[Example], Counts]:
    loaded = readers.read(section.name, pathlib.Path(section.path), split, section.on_error, reads)
    loaded = records.use_as(loaded, reads)
    loaded = records.within(loaded, keys.tokens_of, keys.data.prompt_tokens, keys.data.response_tokens)
    if reads in ("pairs", "judged"):
        loaded = records.without_same(loaded, keys.same.__contains__)
    return loaded.examples, loaded.counts
