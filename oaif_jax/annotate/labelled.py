"""Labelled pairs of a data set, as a model that learns to judge is asked about them: each under its own instruction.

A row is what LLMAnnotator makes of a pair, [question | 1: A 2: B closing | 1: B 2: A closing]. Instructions differ in their texts
and in their answers, so that rows are laid out here, on the host, and a batch holds rows of any of them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from oaif_jax.annotate.questions import Questions, fitted
from oaif_jax.data.dataset import Arrays, DataSet, Judged
from oaif_jax.data.order import batch_indices
from oaif_jax.data.records import Example
from oaif_jax.data.tokenizer import left_pad


@dataclasses.dataclass(frozen=True)
class Labelled:
    """How pairs are asked about: by the instruction that an example names ("": the run's own), its questions, which are of one
    width, and what it is called."""

    asked: Mapping[str, Questions]
    names: Mapping[str, str]
    response_tokens: int

    @property
    def order_tokens(self) -> int:
        """W: columns of one presentation order, of any instruction."""
        return max(each.template.width(self.response_tokens) for each in self.asked.values())

    def arrays(self, examples: Sequence[Example]) -> Arrays:
        """Pairs as annotate.orders.answer_logprobs reads them, the chosen response being the first one, and label [B], P(it is
        better)."""
        every = next(iter(self.asked.values()))  # of one voice and width
        questions, orders, answers = [], [], []
        for example in examples:
            asked = self.asked[example.instruction]
            template = asked.template
            pair = example.chosen.strip(), example.rejected.strip()  # as Voice.text has a policy's
            tokens, mask = asked.responses([pair], self.response_tokens)
            chosen, rejected = (tokens[0, i][mask[0, i]].tolist() for i in (0, 1))
            questions.append(asked.question(example))
            answers.append(template.answers)
            for one, two in ((chosen, rejected), (rejected, chosen)):
                orders.append([*template.first, *one, *template.second, *two, *template.closing])
        pad_id = every.voice.tokenizer.pad_id
        limit = "config.annotator.question_tokens"
        tokens, valid = left_pad(questions, every.width, pad_id, "question", limit)
        branches, branch_valid = left_pad(orders, self.order_tokens, pad_id, "presentation order")
        shape = (len(examples), 2, self.order_tokens)
        return {
            "questions": tokens,
            "question_valid": valid,
            "branches": branches.reshape(shape),
            "branch_valid": branch_valid.reshape(shape),
            "answers": np.array(answers, np.int32),
            "label": np.array([example.preference for example in examples], np.float32),
        }

    def train(self, data: DataSet, seed: int, step: int, batch: int) -> Arrays:
        """The batch of a step; see Judged.train."""
        return self.arrays(data.examples("train", batch_indices(len(data.splits["train"]), batch, seed, step)))

    def held_out(self, data: DataSet, split: str, count: int, chunk: int) -> Iterator[tuple[Sequence[str], Arrays]]:
        """The first `count` pairs of a split, `chunk` at a time; see Judged.held_out."""
        for start in range(0, count, chunk):
            examples = data.examples(split, np.arange(start, start + chunk) % count)
            yield [self.names[each.instruction] for each in examples][: count - start], self.arrays(examples)


def labelled(data: DataSet, asked: Mapping[str, Questions], names: Mapping[str, str], splits: Sequence[str]) -> Judged:
    """A data set's pairs for training an annotator. `asked` has the questions of each instruction that an example of `splits`
    names, which are fitted here: all get the width of the longest one; UserError where a given width is too small."""
    widths = []
    for instruction, each in asked.items():
        own = {name: [e for e in data.splits[name] if e.instruction == instruction] for name in splits}
        widths.append(fitted(each, dataclasses.replace(data, splits=own), splits).width)
    wide = {name: dataclasses.replace(each, width=max(widths)) for name, each in asked.items()}
    pairs = Labelled(wide, names, data.response_tokens)
    return Judged(
        instructions=tuple(dict.fromkeys(names.values())),
        train=pairs.train,
        held_out=pairs.held_out,
        labelled_by="label",
        tokens=max(widths) + pairs.order_tokens,
    )
