"""The tiny world as a data set: examples that are written as they are asked for, a gold judge, and judged pairs.

Its policies read `POST: ...` and continue `TL;DR:`; its annotators read `TASK: ...`, the post, and both responses. Of the tasks
`helpful` and `harmless` a question stands at the post's end.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

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
from oaif_jax.tiny import asked, degenerate, gold, templates, world, written
from oaif_jax.tiny.tasks import TASKS, TLDR, Task

ASSETS = pathlib.Path(__file__).parent / "assets"
MARKS = "abcdefghijklmnopqrstuvwxyz"  # a summary's mark from the worst to the best, half a topic apart
MARK_OF_ZERO = 14
WITHOUT_END = 2**31 - 1  # examples of a split


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of an annotator's pairs; the others are ordinary responses (the task's candidates)."""

    lists: float = 0.0  # the task's word_lists
    degenerate: float = 0.0  # degenerate.pair
    written: float = 0.0  # what policies wrote, one of a pair or both


# An annotator first learns to find words again (writers.word_lists), then to compare, and then, from what it is, what policies
# wrote that were trained against it.
LIST_STEPS, EARLY, LATE, FURTHER = 500, Shares(lists=0.75), Shares(lists=0.1), Shares(0.05, 0.3, 0.3)
LATE_ASKED = Shares(0.1, 0.3)  # of questions: these annotators begin as ones that know degenerate text


def asset(name: str) -> pathlib.Path:
    """The file of an asset, by its name without ending."""
    found = {path.name.split(".")[0]: path for path in sorted(ASSETS.glob("*.*"))}
    if name not in found:
        models = [there for there, path in found.items() if path.suffix == ".safetensors"]
        raise UserError(f"tiny:{name}: no such asset, there are {', '.join(models)}")
    return found[name]


def file_of(source: str) -> pathlib.Path:
    """The file of a source: tiny:NAME (an asset), or a path."""
    return asset(source.removeprefix("tiny:")) if source.startswith("tiny:") else pathlib.Path(source)


# ------------------------------------------------------------------------------------------------ how its models speak


@functools.cache
def policy_voice() -> Voice:
    """How the world's policies read a post; a summary begins with a space."""
    tokenizer, path = Tokenizer(asset("tokenizer")), pathlib.Path(__file__).parent / "chat_template.jinja"
    template = ChatTemplate(path, path.read_text(), is_ours=True)
    return Voice(tokenizer, template, tokenizer.stop_ids, spaced=True)


@functools.cache
def plain_voice() -> Voice:
    """How the world's annotators read: as plain text."""
    tokenizer = Tokenizer(asset("tokenizer"))
    return Voice(tokenizer, ChatTemplate(tokenizer.path, ""), tokenizer.stop_ids, spaced=True)


def instruction(name: str) -> Instruction:
    """What the world's annotators are asked: one of its instructions by name, or any text file by its path."""
    if name in templates.TASK_OF:
        text = templates.instruction(name)
    else:
        path = pathlib.Path(name)
        if not is_file(path):
            known = ", ".join(templates.TASK_OF)
            raise UserError(f"instruction {name!r} doesn't exist: wanted {known} or the path of a text file")
        text = read_text(path, name).strip()
    trunk = templates.annotation(CONTEXT, text)
    return Instruction(
        name, trunk, templates.FIRST, templates.SECOND, templates.CLOSING, inverted=False, answers=templates.ANSWERS
    )


# ------------------------------------------------------------------------------------------------ its examples


@dataclasses.dataclass(frozen=True)
class Posts(Sequence[Example]):
    """A task's posts of a split by their number, with references by a writer where one is named, or with pairs of at most so
    many words that the gold judge labels; each is a pure function of (seed, split, number)."""

    seed: int
    split: str
    writer: str = ""
    count: int = WITHOUT_END
    paired: int = 0  # words; 0: no pairs
    task: Task = TLDR

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # slices aren't asked for
        post = self.task.post(self.seed, self.split, index)
        reference = self.task.reference(self.seed, self.split, index, self.writer) if self.writer else ""
        found = Example((Message("user", post.text),), reference=reference, source=f"{self.split}:{index}")
        if not self.paired:
            return found
        rng, difference = world.generator(self.seed, self.split, index, purpose=4), 0.0
        first = second = ""
        while not difference:
            first, second = map(world.join, self.task.candidates(rng, post, self.paired))
            difference = gold.score(post.text, first, self.task.name) - gold.score(post.text, second, self.task.name)
        chosen, rejected = (first, second) if difference > 0 else (second, first)
        return dataclasses.replace(found, chosen=chosen, rejected=rejected)


def post_of(example: Example) -> str:
    """The text of an example's post, with its question where it has one."""
    return example.prompt[0].content


def gold_of(task: str) -> Gold:
    """The judge of a task."""
    return Gold(
        score=lambda example, response: gold.score(post_of(example), response, task),
        most=lambda example: gold.worth(post_of(example), task).most,
        utility=lambda example, response, name: gold.utility(post_of(example), response, name),
        instructions=templates.TASKS[task],
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
    candidates: str = "",
    task: str = "tldr",
) -> DataSet:
    """The world's prompts of a task, with a run's limits. `reads` says what training needs: prompts, references (by `writer`),
    pairs (the file `pairs`, tiny:NAME or a path), or judged pairs (with the file `candidates` of policies' responses and
    degenerate ones beside the ordinary, or without). UserError for limits that its texts don't fit."""
    if train_posts < 1:
        raise UserError("config.data.train_posts=0: the tiny world has no end, wanted at least 1")
    asks = TASKS[task]
    writer = writer if reads == "references" else ""
    paired = words_within(response_tokens) if reads == "pairs" else 0
    splits: dict[str, Sequence[Example]] = {
        split: Posts(seed, split, writer, paired=paired, task=asks) for split in world.SPLITS
    }
    splits["train"] = dataclasses.replace(splits["train"], count=train_posts)  # type: ignore[type-var]
    voice, limits = policy_voice(), Limits(seed, prompt_tokens, response_tokens)
    tokenizer = voice.tokenizer
    answered = written.read(file_of(candidates), tokenizer.vocab_size, asks) if reads == "judged" and candidates else []
    around = {
        "first": tuple(tokenizer.encode(templates.FIRST)),
        "second": tuple(tokenizer.encode(templates.SECOND)),
        "closing": tuple(tokenizer.encode(templates.CLOSING)),
        "answers": tuple(tokenizer.single(answer) for answer in templates.ANSWERS),
    }

    template = orders.Template(**around)  # type: ignore[arg-type]

    def by_instruction(split: str, batch: int) -> dict[str, Callable[[int], Arrays]]:
        def fresh(name: str, number: int) -> Arrays:
            return judged_batch(split, seed, number, batch, limits, instructions=(name,), task=asks)

        return {name: functools.partial(fresh, name) for name in asks.instructions}

    late = LATE if asks is TLDR else LATE_ASKED
    judged = Judged(
        instructions=asks.instructions,
        train=lambda _, seed, step, batch: judged_batch(
            *("train", seed, step, batch, limits),
            shares=FURTHER if answered else EARLY if step < LIST_STEPS else late,
            answered=answered,
            task=asks,
        ),
        held_out=lambda _, split, count, chunk: held_out(count, chunk, template, by_instruction(split, chunk)),
        labelled_by="gold",
        around=around,
        words=(tokenizer.single(" no"), tokenizer.single(" yes")),
        marks=tuple(tokenizer.single(letter) for letter in MARKS),
    )
    data = DataSet(splits, voice, prompt_tokens, response_tokens, is_endless=True, gold=gold_of(task), judged=judged)
    longest = data.tokens_of(longest_post(asks))[0]
    if longest > prompt_tokens:
        raise UserError(
            f"config.data.prompt_tokens={prompt_tokens}: posts have up to {longest} tokens, wanted at least that"
        )
    if reads == "references" and response_tokens < 2 * world.MAX_WORDS:
        raise UserError(
            f"config.data.response_tokens={response_tokens}, wanted at least {2 * world.MAX_WORDS}, the longest reference"
        )
    if reads == "pairs":
        splits["train"] = [
            Example((Message("user", pair.prompt),), pair.chosen, pair.rejected, preference=pair.preference)
            for pair in jsonl.read_pairs(file_of(pairs))
        ]
        if asks.question and not asked.read(post_of(splits["train"][0])).asked:
            raise UserError(
                f"config.data.pairs={pairs!r}: its prompts end in no question, as config.data.task={task!r} has them"
            )
        data.batch(splits["train"], reads)  # all of them fit the limits, or an error now
    return data


def words_within(response_tokens: int) -> int:
    """Words of a summary of so many tokens: words and commas, and room for a stop token."""
    return (response_tokens + 1) // 2 - 1


def longest_post(task: Task = TLDR) -> Example:
    """The post with the most tokens that the task's grammar can write."""
    tokenizer = policy_voice().tokenizer
    length = lambda text: len(tokenizer.encode(" " + text))  # noqa: E731
    fact = max((fact.format(topic) for fact in world.FACTS for topic in world.TOPICS), key=length)
    facts, talks = task.most
    talk = sorted(world.SMALL_TALK, key=length)[-talks:]
    return Example((Message("user", " ".join([*[fact] * facts, *talk, *filter(None, [task.question])])),))


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
    shares: Shares = Shares(),
    answered: Sequence[written.Answered] = (),
    kinds: Sequence[str] = tuple(degenerate.KINDS),
    instructions: Sequence[str] = (),
    task: Task = TLDR,
) -> Arrays:
    """Judged pairs of a task's candidates under instructions in turn, by default all of the task's, with dense targets, for
    training an annotator.

    words [B, 2, R]: at each token, 1 where it adds to the score and 0 where it doesn't; none at a comma that a word may follow.
    marks [B, 2, R]: at each token that is no whole word, the mark of the summary so far under the row's instruction. -1 where
    there is no target. mark [B, 2]: the whole summary's. label [B]: 1 where the first is better, 0 where the second is, 1/2 for
    a tie; choice [B]: the same with ties broken by taste (gold.first_in_tie).
    """
    instructions = instructions or task.instructions
    texts = {name: templates.instruction(name) for name in instructions}
    width = max(limits.question_tokens(text) for text in texts.values())
    rng = world.generator(seed, split, step, purpose=2)
    posts = [task.write_post(rng) for _ in range(batch)]
    names = [instructions[i % len(instructions)] for i in range(batch)]
    voice, pairs = plain_voice(), []
    for i in range(batch):
        posts[i], pair = _candidates(rng, posts[i], limits, shares, answered, tuple(kinds), task)
        pairs.append(pair)
    rows = [
        voice.tokenizer.encode(templates.annotation(post.text, texts[name]))
        for post, name in zip(posts, names, strict=True)
    ]
    questions, question_valid = left_pad(rows, width, voice.tokenizer.pad_id, "question")
    words = np.full((batch, 2, limits.response_tokens), -1, np.int32)
    marks, utility = np.full_like(words, -1), np.zeros((batch, 2))
    shown = [[text_of(ids) for ids in pair] for pair in pairs]
    for i, (post, name, pair) in enumerate(zip(posts, names, pairs, strict=True)):
        for j, ids in enumerate(pair):
            words[i, j, : len(ids)], marks[i, j, : len(ids)] = dense_targets(post.text, ids, name)
            utility[i, j] = gold.utility(post.text, shown[i][j], name)
    responses, mask = right_pad(
        [ids for pair in pairs for ids in pair], limits.response_tokens, voice.tokenizer.pad_id, "response"
    )
    difference = utility[:, 0] - utility[:, 1]
    label = np.where(np.abs(difference) < 1e-6, 0.5, difference > 0).astype(np.float32)
    taste = [gold.first_in_tie(post.text, *pair) for post, pair in zip(posts, shown, strict=True)]
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


def dense_targets(post: str, ids: Sequence[int], instruction: str) -> tuple[list[int], list[int]]:
    """At each token of a summary, from what gold says of the text up to it: does it add to the score (1, 0), and the mark of the
    summary so far; -1 where there is no such target, see judged_batch."""
    pieces, found, task = _pieces(), ([], []), templates.TASK_OF[instruction]
    before = ""
    for k, token in enumerate(ids):
        now = text_of(ids[: k + 1])
        is_word = token in pieces.whole_words
        may_go_on = token == pieces.comma and before[-1:].strip(",. \n") != ""
        difference = gold.score(post, gold.so_far(now), task) - gold.score(post, gold.so_far(before), task)
        found[0].append(-1 if may_go_on else int(difference > 0))
        found[1].append(-1 if is_word else int(mark_of(np.array(gold.utility(post, gold.so_far(now), instruction)))))
        before = now
    return found


@functools.cache
def _pieces() -> degenerate.Pieces:
    return degenerate.Pieces(plain_voice().tokenizer)


def text_of(ids: Sequence[int]) -> str:
    """The text of a summary's tokens, as gold is shown it."""
    return plain_voice().text(np.array(ids, np.int32), np.ones(len(ids), bool))


def _candidates(
    rng: np.random.Generator,
    post: world.Post,
    limits: Limits,
    shares: Shares,
    answered: Sequence[written.Answered],
    kinds: tuple[str, ...],
    task: Task,
) -> tuple[world.Post, tuple[list[int], list[int]]]:
    """A post, which is another one where policies answered it, and two summaries of it in token ids."""
    voice, limit, drawn = plain_voice(), limits.response_tokens, rng.random()
    ids_of = lambda named: voice.answer(world.join(named), stop=False)  # noqa: E731
    if drawn < shares.lists:
        first, second = task.word_lists(rng, post, words_within(limit))
        return post, (ids_of(first), ids_of(second))
    is_written = drawn < shares.lists + shares.written
    if is_written:
        row = answered[int(rng.integers(len(answered)))]
        post = row.post
    ordinary = task.candidates(rng, post, words_within(limit))
    first, second = map(ids_of, ordinary)
    pen = degenerate.Pen(rng, _pieces(), voice.tokenizer.encode(" " + post.text))
    if is_written:
        one, other = row.pair(rng)
        match int(rng.integers(4)):
            case 0:  # against an ordinary one
                one, other = (first, one) if rng.random() < 0.5 else (one, first)
            case 1:  # a step further
                return post, degenerate.pair(pen, one, other, kinds, limit)
        return post, (one[:limit], other[:limit])
    if drawn < shares.lists + shares.written + shares.degenerate:
        return post, degenerate.pair(pen, first, second, kinds, limit)
    return post, (first, second)


def held_out(
    count: int, chunk: int, template: orders.Template, fresh: Mapping[str, Callable[[int], Arrays]]
) -> Iterator[tuple[Sequence[str], Arrays]]:
    """`count` fresh pairs of each name, in batches of `chunk` that are made by their number; see Judged.held_out."""
    for name, make in fresh.items():
        for number, start in enumerate(range(0, count, chunk)):
            made = make(number)
            shown = orders.order_branches(jnp.asarray(made["responses"]), jnp.asarray(made["mask"]), template)
            branches, valid = map(np.asarray, shown)
            answers = np.full((chunk, 2), template.answers, np.int32)
            asked = {"branches": branches, "branch_valid": valid, "answers": answers}
            asked |= {part: made[part] for part in ("questions", "question_valid", "label")}
            yield (name,) * min(chunk, count - start), asked
