"""The tiny world as a data set: examples that are written as they are asked for, a gold judge, and judged pairs.

Its policies read `POST: ...` and continue `TL;DR:`; its annotators read `TASK: ...`, the post, and both summaries.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from oaif_jax.annotate import orders
from oaif_jax.annotate.prompts import CONTEXT, Instruction, read_text
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file
from oaif_jax.data import jsonl
from oaif_jax.data.chat import ChatTemplate
from oaif_jax.data.dataset import Arrays, DataSet, Gold, Judged
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import Tokenizer, left_pad, right_pad
from oaif_jax.data.voice import Voice
from oaif_jax.tiny import gold, templates, world, writers

ASSETS = pathlib.Path(__file__).parent / "assets"
MARKS = "abcdefghijklmnopqrstuvwxyz"  # a summary's mark from the worst to the best, half a topic apart
MARK_OF_ZERO = 14
WITHOUT_END = 2**31 - 1  # examples of a split

# An annotator first learns to find words again (writers.word_lists), then to compare.
LIST_STEPS, EARLY_LISTS, LATE_LISTS = 500, 0.75, 0.1


def asset(name: str) -> pathlib.Path:
    """The file of an asset, by its name without ending."""
    found = {path.name.split(".")[0]: path for path in sorted(ASSETS.glob("*.*"))}
    if name not in found:
        raise UserError(f"tiny:{name}: no such asset, there are {', '.join(found)}")
    return found[name]


# ------------------------------------------------------------------------------------------------ how its models speak


@functools.cache
def policy_voice() -> Voice:
    """How the world's policies read a post; a summary begins with a space."""
    tokenizer, path = Tokenizer(asset("tokenizer")), pathlib.Path(__file__).parent / "chat_template.jinja"
    template = ChatTemplate(path, path.read_text(), is_ours=True)
    return Voice(tokenizer, template, tokenizer.stop_ids, spaced=True, has_control=False)


@functools.cache
def plain_voice() -> Voice:
    """How the world's annotators read: as plain text."""
    tokenizer = Tokenizer(asset("tokenizer"))
    return Voice(tokenizer, ChatTemplate(tokenizer.path, ""), tokenizer.stop_ids, spaced=True, has_control=False)


def instruction(name: str) -> Instruction:
    """What the world's annotators are asked: one of its instructions by name, or any text file by its path."""
    if name in templates.INSTRUCTIONS:
        text = templates.instruction(name)
    else:
        path = pathlib.Path(name)
        if not is_file(path):
            known = ", ".join(templates.INSTRUCTIONS)
            raise UserError(f"instruction {name!r} doesn't exist: wanted {known} or the path of a text file")
        text = read_text(path, name).strip()
    trunk = templates.annotation(CONTEXT, text)
    return Instruction(
        name, trunk, templates.FIRST, templates.SECOND, templates.CLOSING, inverted=False, answers=templates.ANSWERS
    )


# ------------------------------------------------------------------------------------------------ its examples


@dataclasses.dataclass(frozen=True)
class Posts(Sequence[Example]):
    """The posts of a split by their number, with references by a writer where one is named, or with pairs of at most so many
    words that the gold judge labels; each is a pure function of (seed, split, number)."""

    seed: int
    split: str
    writer: str = ""
    count: int = WITHOUT_END
    paired: int = 0  # words; 0: no pairs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # slices aren't asked for
        post = world.post(self.seed, self.split, index)
        reference = writers.reference(self.seed, self.split, index, self.writer) if self.writer else ""
        found = Example((Message("user", post.text),), reference=reference, source=f"{self.split}:{index}")
        if not self.paired:
            return found
        rng, difference = world.generator(self.seed, self.split, index, purpose=4), 0.0
        first = second = ""
        while not difference:
            first, second = map(world.join, writers.candidates(rng, post.topics, self.paired))
            difference = gold.score(post.text, first) - gold.score(post.text, second)
        chosen, rejected = (first, second) if difference > 0 else (second, first)
        return dataclasses.replace(found, chosen=chosen, rejected=rejected)


def post_of(example: Example) -> str:
    """The text of an example's post."""
    return example.prompt[0].content


GOLD = Gold(
    score=lambda example, response: gold.score(post_of(example), response),
    most=lambda example: float(len(world.topics_of(post_of(example)))),
    utility=lambda example, response, name: gold.utility(post_of(example), response, name),
    instructions=templates.INSTRUCTIONS,
)


def dataset(
    reads: str,
    *,
    seed: int,
    train_posts: int,
    prompt_tokens: int,
    response_tokens: int,
    writer: str = "reference",
    pairs: str = "tiny:pairs",
) -> DataSet:
    """The world with a run's limits. `reads` says what training needs: prompts, references (by `writer`), pairs (the file
    `pairs`, tiny:NAME or a path), or judged pairs. UserError for limits that its texts don't fit."""
    if train_posts < 1:
        raise UserError("config.data.train_posts=0: the tiny world has no end, wanted at least 1")
    writer = writer if reads == "references" else ""
    paired = words_within(response_tokens) if reads == "pairs" else 0
    splits: dict[str, Sequence[Example]] = {split: Posts(seed, split, writer, paired=paired) for split in world.SPLITS}
    splits["train"] = dataclasses.replace(splits["train"], count=train_posts)  # type: ignore[type-var]
    voice, limits = policy_voice(), Limits(seed, prompt_tokens, response_tokens)
    tokenizer = voice.tokenizer
    around = {
        "first": tuple(tokenizer.encode(templates.FIRST)),
        "second": tuple(tokenizer.encode(templates.SECOND)),
        "closing": tuple(tokenizer.encode(templates.CLOSING)),
        "answers": tuple(tokenizer.single(answer) for answer in templates.ANSWERS),
    }
    judged = Judged(
        instructions=templates.INSTRUCTIONS,
        train=lambda _, seed, step, batch: judged_batch(
            "train", seed, step, batch, limits, lists=EARLY_LISTS if step < LIST_STEPS else LATE_LISTS
        ),
        held_out=lambda _, split, count, chunk: held_out(split, count, chunk, limits, orders.Template(**around)),  # type: ignore[arg-type]
        labelled_by="gold",
        around=around,
        words=(tokenizer.single(" no"), tokenizer.single(" yes")),
        marks=tuple(tokenizer.single(letter) for letter in MARKS),
    )
    data = DataSet(splits, voice, prompt_tokens, response_tokens, is_endless=True, gold=GOLD, judged=judged)
    longest = data.tokens_of(longest_post())[0]
    if longest > prompt_tokens:
        raise UserError(
            f"config.data.prompt_tokens={prompt_tokens}: posts have up to {longest} tokens, wanted at least that"
        )
    if reads == "references" and response_tokens < 2 * world.MAX_WORDS:
        raise UserError(
            f"config.data.response_tokens={response_tokens}, wanted at least {2 * world.MAX_WORDS}, the longest reference"
        )
    if reads == "pairs":
        path = asset(pairs.removeprefix("tiny:")) if pairs.startswith("tiny:") else pathlib.Path(pairs)
        splits["train"] = [
            Example((Message("user", pair.prompt),), pair.chosen, pair.rejected, preference=pair.preference)
            for pair in jsonl.read_pairs(path)
        ]
        data.batch(splits["train"], reads)  # all of them fit the limits, or an error now
    return data


def words_within(response_tokens: int) -> int:
    """Words of a summary of so many tokens: words and commas, and room for a stop token."""
    return (response_tokens + 1) // 2 - 1


def longest_post() -> Example:
    """The post with the most tokens that the grammar can write."""
    tokenizer = policy_voice().tokenizer
    length = lambda text: len(tokenizer.encode(" " + text))  # noqa: E731
    fact = max((fact.format(topic) for fact in world.FACTS for topic in world.TOPICS), key=length)
    talk = sorted(world.SMALL_TALK, key=length)[-world.MAX_SMALL_TALK :]
    return Example((Message("user", " ".join([fact] * world.MAX_TOPICS + talk)),))


# ------------------------------------------------------------------------------------------------ judged pairs


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seed and limits in tokens of judged pairs."""

    seed: int
    prompt_tokens: int
    response_tokens: int

    def question_tokens(self, text: str) -> int:
        """Q: columns of an annotator's question under an instruction; few different ones, so that few programs are made."""
        empty = len(plain_voice().tokenizer.encode(templates.annotation("", text)))
        return -(-(empty + self.prompt_tokens) // 16) * 16


def mark_of(utility: np.ndarray) -> np.ndarray:
    """The number of a mark, from utilities."""
    return np.asarray(np.clip(np.round(2 * utility) + MARK_OF_ZERO, 0, len(MARKS) - 1), np.int32)


def judged_batch(
    split: str,
    seed: int,
    step: int,
    batch: int,
    limits: Limits,
    *,
    lists: float = 0.0,
    instructions: Sequence[str] = templates.INSTRUCTIONS,
) -> Arrays:
    """Judged pairs of fresh candidates under instructions in turn, with dense targets, for training an annotator.

    A share of `lists` of the pairs are word lists, see writers.word_lists.
    words [B, 2, R]: at each word, 1 where it adds to the score and 0 where it doesn't; marks [B, 2, R]: at each comma,
    the mark of the summary so far under the row's instruction; -1 elsewhere. mark [B, 2]: the whole summary's.
    label [B]: 1 where the first is better, 0 where the second is, 1/2 for a tie; choice [B]: the same with ties broken
    by taste (gold.first_in_tie).
    """
    texts = {name: templates.instruction(name) for name in instructions}
    width = max(limits.question_tokens(text) for text in texts.values())
    rng = world.generator(seed, split, step, purpose=2)
    posts = [world.write_post(rng) for _ in range(batch)]
    names = [instructions[i % len(instructions)] for i in range(batch)]
    limit = words_within(limits.response_tokens)
    pairs = [
        writers.word_lists(rng, post.topics, limit)
        if rng.random() < lists
        else writers.candidates(rng, post.topics, limit)
        for post in posts
    ]
    voice = plain_voice()
    rows = [
        voice.tokenizer.encode(templates.annotation(post.text, texts[name]))
        for post, name in zip(posts, names, strict=True)
    ]
    questions, question_valid = left_pad(rows, width, voice.tokenizer.pad_id, "question")
    words = np.full((batch, 2, limits.response_tokens), -1, np.int32)
    marks, utility = np.full_like(words, -1), np.zeros((batch, 2))
    for i, (post, name, pair) in enumerate(zip(posts, names, pairs, strict=True)):
        for j, named in enumerate(pair):
            # One word is one token, and every other token is a comma.
            words[i, j, : 2 * len(named) : 2] = [w in post.topics and w not in named[:k] for k, w in enumerate(named)]
            useful = [gold.utility(post.text, world.join(named[:k]), name) for k in range(len(named) + 1)]
            marks[i, j, 1 : 2 * max(len(named), 1) - 1 : 2] = mark_of(np.array(useful[1:-1]))
            utility[i, j] = useful[-1]
    joined = [(world.join(first), world.join(second)) for first, second in pairs]
    shown = [voice.answer(text, stop=False) for pair in joined for text in pair]
    responses, mask = right_pad(shown, limits.response_tokens, voice.tokenizer.pad_id, "response")
    difference = utility[:, 0] - utility[:, 1]
    label = np.where(np.abs(difference) < 1e-6, 0.5, difference > 0).astype(np.float32)
    taste = [gold.first_in_tie(post.text, *texts) for post, texts in zip(posts, joined, strict=True)]
    taste = np.array([0.5 if is_first is None else is_first for is_first in taste], np.float32)
    return {
        "questions": questions,
        "question_valid": question_valid,
        "responses": responses.reshape(words.shape),
        "mask": mask.reshape(words.shape),
        "words": words,
        "marks": marks,
        "mark": mark_of(utility),
        "label": label,
        "choice": np.where(label == 0.5, taste, label),
    }


def held_out(
    split: str, count: int, chunk: int, limits: Limits, template: orders.Template
) -> Iterator[tuple[Sequence[str], Arrays]]:
    """`count` fresh pairs under each instruction, in batches of `chunk`; see Judged.held_out."""
    for name in templates.INSTRUCTIONS:
        for number, start in enumerate(range(0, count, chunk)):
            made = judged_batch(split, limits.seed, number, chunk, limits, instructions=(name,))
            shown = orders.order_branches(jnp.asarray(made["responses"]), jnp.asarray(made["mask"]), template)
            branches, valid = map(np.asarray, shown)
            answers = np.full((chunk, 2), template.answers, np.int32)
            asked = {"branches": branches, "branch_valid": valid, "answers": answers}
            asked |= {part: made[part] for part in ("questions", "question_valid", "label")}
            yield (name,) * min(chunk, count - start), asked
