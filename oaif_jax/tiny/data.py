"""Batches of the tiny world, as arrays that the steps take and texts that the gold judge reads."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from oaif_jax.annotate.llm import Template
from oaif_jax.base.errors import UserError
from oaif_jax.data.jsonl import TextPair
from oaif_jax.data.tokenizer import Tokenizer, left_pad, right_pad
from oaif_jax.tiny import gold, templates, world, writers

ASSETS = pathlib.Path(__file__).parent / "assets"
MARKS = "abcdefghijklmnopqrstuvwxyz"  # a summary's mark from the worst to the best, half a topic apart
MARK_OF_ZERO = 14

Arrays = dict[str, np.ndarray]


def asset(name: str) -> pathlib.Path:
    """The file of an asset, by its name without ending."""
    found = sorted(ASSETS.glob(f"{name}.*"))
    if len(found) != 1:
        known = sorted({path.name.split(".")[0] for path in ASSETS.glob("*.*")})
        raise UserError(f"tiny:{name}: no such asset, there are {', '.join(known)}")
    return found[0]


def instruction_text(name: str) -> str:
    """The text of an instruction: one of the tiny world's by name, or any text file by its path."""
    if name in templates.INSTRUCTIONS:
        return templates.instruction(name)
    path = pathlib.Path(name)
    if not path.is_file():
        raise UserError(
            f"instruction {name!r} doesn't exist: wanted {', '.join(templates.INSTRUCTIONS)} or the path of a text file"
        )
    return path.read_text().strip()


def mark_of(utility: np.ndarray) -> np.ndarray:
    """The number of a mark, from utilities."""
    return np.asarray(np.clip(np.round(2 * utility) + MARK_OF_ZERO, 0, len(MARKS) - 1), np.int32)


@dataclasses.dataclass(frozen=True)
class TinyGold:
    """The gold judge, as data.source has it."""

    def score(self, example: world.Post, response: str) -> float:
        return gold.score(example.text, response)

    def most(self, example: world.Post) -> float:
        return float(len(example.topics))

    def utility(self, example: world.Post, response: str, instruction: str) -> float:
        return gold.utility(example.text, response, instruction)


@dataclasses.dataclass(frozen=True)
class TinyData:
    """Posts by seed, and their forms for policy and annotator; limits are in tokens."""

    tokenizer: Tokenizer
    seed: int
    prompt_tokens: int
    response_tokens: int
    writer: str = "reference"  # of the references
    gold: TinyGold = dataclasses.field(default_factory=TinyGold)

    def shown(self, example: world.Post) -> str:
        """The post."""
        return example.text

    def examples(self, split: str, indices: Sequence[int] | np.ndarray) -> list[world.Post]:
        """Posts by their number in a split."""
        return [world.post(self.seed, split, int(index)) for index in indices]

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that the grammar can write."""
        length = lambda text: len(self.tokenizer.encode(" " + text))  # noqa: E731
        fact = max((fact.format(topic) for fact in world.FACTS for topic in world.TOPICS), key=length)
        talk = sorted(world.SMALL_TALK, key=length)[-world.MAX_SMALL_TALK :]
        return len(self.tokenizer.encode(templates.prompt(" ".join([fact] * world.MAX_TOPICS + talk))))

    def prompts(self, examples: Sequence[world.Post]) -> Arrays:
        """What the policy continues: prompts, prompt_valid, [B, S]."""
        rows = [self.tokenizer.encode(templates.prompt(post.text)) for post in examples]
        tokens, valid = left_pad(rows, self.prompt_tokens, self.tokenizer.pad_id, "prompt")
        return {"prompts": tokens, "prompt_valid": valid}

    def question_tokens(self, instruction: str) -> int:
        """Q: columns of an annotator's question under an instruction; few different ones, so that few programs are made."""
        return -(-(len(self.tokenizer.encode(templates.annotation("", instruction))) + self.prompt_tokens) // 16) * 16

    def questions(self, instruction: str) -> "TinyQuestions":
        """How an annotator is asked under an instruction, given by its text."""
        return TinyQuestions(self, instruction)

    def ids(self, summary: str, *, stop: bool) -> list[int]:
        """A summary's tokens as they follow the cue (or an annotator's mark), with the stop token or without."""
        ids = self.tokenizer.encode(" " + summary) if summary else []
        return [*ids, self.tokenizer.stop_ids[0]] if stop else ids

    def responses(self, summaries: Sequence[Sequence[str]], *, stop: bool) -> Arrays:
        """C summaries of each post: responses, mask, [B, C, R]."""
        count = len(summaries[0])
        rows = [self.ids(summary, stop=stop) for group in summaries for summary in group]
        tokens, mask = right_pad(rows, self.response_tokens, self.tokenizer.pad_id, "response")
        shape = (len(summaries), count, self.response_tokens)
        return {"responses": tokens.reshape(shape), "mask": mask.reshape(shape)}

    def text(self, tokens: np.ndarray, mask: np.ndarray) -> str:
        """The summary of a response's tokens [R]."""
        stop = self.tokenizer.stop_ids
        return self.tokenizer.decode(
            [token for token, kept in zip(tokens, mask, strict=True) if kept and token not in stop]
        ).strip()

    def references(self, split: str, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The reference summaries of posts by their number in a split."""
        return [writers.reference(self.seed, split, int(index), self.writer) for index in indices]

    def sft_batch(self, split: str, indices: np.ndarray) -> Arrays:
        """Prompts and references, for fine-tuning."""
        references = [[text] for text in self.references(split, indices)]
        return self.prompts(self.examples(split, indices)) | self.responses(references, stop=True)

    def pair_batch(self, pairs: Sequence[TextPair]) -> Arrays:
        """Prompts with their chosen and rejected responses, for offline training; the chosen one comes first."""
        posts = [world.Post(pair.prompt, world.topics_of(pair.prompt)) for pair in pairs]
        responses = self.responses([(pair.chosen, pair.rejected) for pair in pairs], stop=True)
        return self.prompts(posts) | responses | {"first_is_better": np.ones(len(pairs), bool)}

    def template(self) -> Template:
        """Token ids of the annotator's fixed texts."""
        ids = lambda text: tuple(self.tokenizer.encode(text))  # noqa: E731
        first, second = (self.tokenizer.single(answer) for answer in templates.ANSWERS)
        if first == second:
            raise UserError(f"answers {templates.ANSWERS} are the same token, wanted two")
        return Template(ids(templates.FIRST), ids(templates.SECOND), ids(templates.CLOSING), (first, second))

    def annotator_batch(
        self,
        split: str,
        seed: int,
        step: int,
        batch: int,
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
        width = max(self.question_tokens(text) for text in texts.values())
        rng = world.generator(seed, split, step, purpose=2)
        posts = [world.write_post(rng) for _ in range(batch)]
        names = [instructions[i % len(instructions)] for i in range(batch)]
        limit = (self.response_tokens + 1) // 2 - 1  # words and commas, and room for a stop token
        pairs = [
            writers.word_lists(rng, post.topics, limit)
            if rng.random() < lists
            else writers.candidates(rng, post.topics, limit)
            for post in posts
        ]
        rows = [
            self.tokenizer.encode(templates.annotation(p.text, texts[n])) for p, n in zip(posts, names, strict=True)
        ]
        questions, question_valid = left_pad(rows, width, self.tokenizer.pad_id, "question")
        words = np.full((batch, 2, self.response_tokens), -1, np.int32)
        marks, utility = np.full_like(words, -1), np.zeros((batch, 2))
        for i, (post, name, pair) in enumerate(zip(posts, names, pairs, strict=True)):
            for j, named in enumerate(pair):
                # One word is one token, and every other token is a comma.
                words[i, j, : 2 * len(named) : 2] = [
                    w in post.topics and w not in named[:k] for k, w in enumerate(named)
                ]
                useful = [gold.utility(post.text, world.join(named[:k]), name) for k in range(len(named) + 1)]
                marks[i, j, 1 : 2 * max(len(named), 1) - 1 : 2] = mark_of(np.array(useful[1:-1]))
                utility[i, j] = useful[-1]
        joined = [(world.join(first), world.join(second)) for first, second in pairs]
        difference = utility[:, 0] - utility[:, 1]
        label = np.where(np.abs(difference) < 1e-6, 0.5, difference > 0).astype(np.float32)
        taste = [gold.first_in_tie(post.text, *texts) for post, texts in zip(posts, joined, strict=True)]
        taste = np.array([0.5 if is_first is None else is_first for is_first in taste], np.float32)
        return {
            "questions": questions,
            "question_valid": question_valid,
            **self.responses(joined, stop=False),
            "words": words,
            "marks": marks,
            "mark": mark_of(utility),
            "label": label,
            "choice": np.where(label == 0.5, taste, label),
        }


@dataclasses.dataclass(frozen=True)
class TinyQuestions:
    """How the tiny world's annotators are asked: the instruction and the post, then both summaries."""

    data: TinyData
    instruction: str  # its text
    same_tokens: bool = True

    @property
    def template(self) -> Template:
        """Token ids of the fixed texts."""
        return self.data.template()

    def batch(self, examples: Sequence[world.Post]) -> Arrays:
        """What the annotator reads before the summaries: questions, question_valid, [B, Q]."""
        tokenizer = self.data.tokenizer
        rows = [tokenizer.encode(templates.annotation(post.text, self.instruction)) for post in examples]
        width = self.data.question_tokens(self.instruction)
        tokens, valid = left_pad(rows, width, tokenizer.pad_id, "question")
        return {"questions": tokens, "question_valid": valid}

    def read(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same tokens, stop tokens masked."""
        return tokens, mask & ~np.isin(tokens, self.data.tokenizer.stop_ids)
