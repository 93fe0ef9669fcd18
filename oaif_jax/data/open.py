"""The data that a config names: the tiny world, or texts from files, in the policy's voice."""

import dataclasses
import pathlib

import numpy as np

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file
from oaif_jax.config import Data, Eval
from oaif_jax.data import readers, records
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.records import Counts, Example
from oaif_jax.data.voice import Voice

JOINED = 200  # examples whose prompts and responses are tokenized as one text, to say how often that differs


def texts(section: Data, evaluation: Eval, voice: Voice, reads: str) -> DataSet:
    """Examples of files for what a method reads (prompts, references or pairs), those that are evaluated on held out."""
    if reads not in records.USES:
        raise UserError(f"config.data.name={section.name!r} has no {reads} pairs, wanted 'tiny'")
    if not section.path:
        raise UserError(f"config.data.path='': wanted the file or directory of config.data.name={section.name!r}")
    is_file(pathlib.Path(section.path))  # what can't be looked at is said now
    data = DataSet({}, voice, section.prompt_tokens, section.response_tokens)
    wanted = {"train": section.train, "validation": section.validation, "test": section.test}
    notes, splits = [], {}
    for name, split in wanted.items():
        if name == "train" or split:
            splits[name], counts = _read(section, data, split, reads)
            notes.append(f"{section.path}{f' {split}' if split else ''}: {counts}")
    splits |= _hold_out(section, splits)
    # Pairs may have several responses to a prompt: none that is evaluated on is trained on.
    kept = {example.prompt for name in ("validation", "test") for example in splits[name]}
    train = [example for example in splits["train"] if example.prompt not in kept]
    splits["train"] = train[: section.train_posts or None]
    for name, count in (("validation", evaluation.prompts), (evaluation.final_split, evaluation.final_prompts)):
        if len(splits[name]) < count:
            raise UserError(f"config.data: {name} has {len(splits[name])} examples, wanted {count} for evaluations")
    if not splits["train"]:
        raise UserError(f"config.data.held_out={section.held_out}: nothing is left to train on, wanted fewer")
    if reads != "prompts":
        notes.append(f"the first {JOINED} examples: {voice.joining(splits['train'][:JOINED])}")
    return dataclasses.replace(data, splits=splits, notes=tuple(notes))


def _read(section: Data, data: DataSet, split: str, reads: str) -> tuple[list[Example], Counts]:
    loaded = readers.read(section.name, pathlib.Path(section.path), split, section.on_error)
    loaded = records.use_as(loaded, reads)
    loaded = records.within(loaded, data.tokens_of, data.prompt_tokens, data.response_tokens)
    return loaded.examples, loaded.counts


def _hold_out(section: Data, splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Splits that weren't named, taken from train by a shuffle of the data's seed, and what is left of train."""
    missing = [name for name in ("validation", "test") if name not in splits]
    train = splits["train"]
    wanted = section.held_out * len(missing)
    if len(train) <= wanted:
        raise UserError(
            f"config.data.held_out={section.held_out}: there are {len(train)} examples, wanted more than {wanted}"
        )
    order = np.random.default_rng(section.seed).permutation(len(train))
    taken = {name: order[i * section.held_out : (i + 1) * section.held_out] for i, name in enumerate(missing)}
    found = {name: [train[i] for i in sorted(indices)] for name, indices in taken.items()}
    return found | {"train": [train[i] for i in sorted(order[wanted:])]}
