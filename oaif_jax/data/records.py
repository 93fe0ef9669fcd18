"""One record for prompts, references and preference pairs, and the counts of what was read and what was left out."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from oaif_jax.base.errors import UserError, near

ROLES = ("system", "user", "assistant")
USES = ("prompts", "references", "pairs", "judged")
EMPTY = "empty"  # the reason of RecordError that has a count of its own
TIED, REVERSED = "tied", "reversed"  # the reasons of UndecidedError


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; its role is one of ROLES."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, which ends with a user's message, and what the data have to answer it.

    A pair has `chosen` and `rejected`, which differ, and one of them may be empty; its `preference` is below 1 where the data say
    how probably the chosen one is better, and its `instruction` is there where they say by which that is. Supervised data have a
    `reference`; for online training the prompt is enough. `source` is "file:line", or "file:row" of a table. `is_conversation` is
    what a lone message may leave open: whether it is said to somebody, or is a text to be continued as it stands.
    """

    prompt: tuple[Message, ...]
    chosen: str = ""
    rejected: str = ""
    reference: str = ""
    preference: float = 1.0  # of a pair: P(chosen is better)
    source: str = ""
    instruction: str = ""  # of a pair: by its name or path; of another one the other response may be better
    is_conversation: bool = dataclasses.field(default=False, compare=False)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat templates take it."""
        return [dataclasses.asdict(message) for message in self.prompt]

    @property
    def is_pair(self) -> bool:
        return self.chosen != self.rejected

    @property
    def responses(self) -> tuple[str, ...]:
        """The responses there are: two of a pair, a reference, or none."""
        return ((self.chosen, self.rejected) if self.is_pair else ()) + ((self.reference,) if self.reference else ())


class RecordError(ValueError):
    """A line that is not what its format says. `reason`, a word or two, is what such lines are counted by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class UndecidedError(Exception):
    """A pair that prefers nothing by its own record, which is as its format says: `reason` is TIED or REVERSED."""

    def __init__(self, reason: str, example: Example):
        super().__init__(reason)
        self.reason, self.example = reason, example


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many records were kept, and why the others were not."""

    kept: int = 0
    empty: int = 0  # without a prompt, or without a reference where one is wanted
    identical: int = 0  # pairs of two equal responses, as texts or as tokens, which prefer nothing
    tied: int = 0  # pairs of equal scores, or with as many votes for one response as for the other
    reversed: int = 0  # pairs whose rejected response has the higher score
    duplicate: int = 0  # equal to an earlier record, the first one being kept
    outvoted: int = 0  # pairs that more records have the other way round
    too_long: int = 0
    malformed: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by reason

    def __str__(self) -> str:
        """In: Counts(kept=7, too_long=2, malformed={"not JSON": 1}). Out: "7 kept, 2 too long, 1 malformed (1 not JSON)" """
        names = [field.name for field in dataclasses.fields(self) if field.name != "malformed"]
        parts = [f"{getattr(self, name):,} {name.replace('_', ' ')}" for name in names if getattr(self, name)]
        if self.malformed:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.malformed.items()))
            parts.append(f"{sum(self.malformed.values()):,} malformed ({reasons})")
        return ", ".join(parts) or "nothing"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Examples in the order of their files, and the counts of all that was read."""

    examples: list[Example]
    counts: Counts


def distinct(examples: Sequence[Example]) -> list[Example]:
    """The first of equal examples, wherever they come from: the same prompt with other responses is another example."""
    first: dict[Example, Example] = {}
    for example in examples:
        first.setdefault(dataclasses.replace(example, source=""), example)
    return list(first.values())


def by_majority(examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """Each pair once under each instruction, as most of its records have it, whatever raters and files they come from; and all
    else that is distinct.

    Of records that agree the first is kept. The others are counted: "duplicate" (they say the same), "outvoted" (the
    opposite), "tied" (as many say one thing as the other, and none of them is kept).
    """
    votes = collections.Counter(
        (example.prompt, example.chosen, example.rejected, example.instruction) for example in examples
    )
    left: collections.Counter[str] = collections.Counter()
    kept = []
    for example in examples:
        agree = votes[example.prompt, example.chosen, example.rejected, example.instruction]
        differ = votes[example.prompt, example.rejected, example.chosen, example.instruction] if example.is_pair else 0
        if agree <= differ:
            left[TIED if agree == differ else "outvoted"] += 1
        else:
            kept.append(example)
    different = distinct(kept)
    return different, {**left, "duplicate": len(kept) - len(different)}


def use_as(loaded: Loaded, use: str) -> Loaded:
    """The examples as what they are for, duplicates of that dropped and counted: each prompt once under "prompts".

    "prompts" (online training) drops the responses; "references" (fine-tuning) takes a pair's chosen response where there
    is no reference, and drops examples whose reference is empty; "pairs" (offline training) drops references, and "judged"
    (training of annotators) keeps each pair's instruction beside it.
    Raises UserError when the data have no such thing.
    """
    if use not in USES:
        raise UserError(f"use={use!r} doesn't exist{near(use, USES)}")
    forms = [_form(example, use) for example in loaded.examples]
    there = [form for form in forms if form is not None]
    if not there:
        raise UserError(f"data: none of {len(forms):,} examples can be used as {use}; wanted data that have them")
    kept = distinct(there)
    counts = dataclasses.replace(
        loaded.counts,
        kept=len(kept),
        empty=loaded.counts.empty + len(forms) - len(there),
        duplicate=loaded.counts.duplicate + len(there) - len(kept),
    )
    return Loaded(kept, counts)


def _form(example: Example, use: str) -> Example | None:
    """The example with what a use needs and no more; None if its reference is empty."""
    if use == "prompts":
        return dataclasses.replace(example, chosen="", rejected="", reference="", preference=1.0, instruction="")
    if use in ("pairs", "judged"):
        if not example.is_pair:
            raise UserError(f"{example.source}: has no chosen and rejected response, wanted pairs")
        return dataclasses.replace(example, reference="", instruction=example.instruction if use == "judged" else "")
    reference = example.reference or example.chosen
    return (
        dataclasses.replace(example, chosen="", rejected="", reference=reference, preference=1.0, instruction="")
        if reference
        else None
    )


def without_same(loaded: Loaded, same: Callable[[Example], bool]) -> Loaded:
    """Without the pairs whose responses are the `same` to a policy (texts can become equal tokens), counted as identical."""
    kept = [example for example in loaded.examples if not same(example)]
    if not kept:
        raise UserError(f"data: the responses of all {len(loaded.examples):,} pairs are the same tokens; wanted others")
    identical = loaded.counts.identical + len(loaded.examples) - len(kept)
    return Loaded(kept, dataclasses.replace(loaded.counts, kept=len(kept), identical=identical))


def within(
    loaded: Loaded, tokens_of: Callable[[Example], tuple[int, int]], prompt_tokens: int, response_tokens: int
) -> Loaded:
    """The examples that fit, the others counted as too long: nothing is cut.

    `tokens_of(example)` is (tokens of the prompt, tokens of the longest of example.responses, stop token included).
    """

    def fits(example: Example) -> bool:
        prompt, response = tokens_of(example)
        return prompt <= prompt_tokens and response <= response_tokens

    kept = [example for example in loaded.examples if fits(example)]
    if not kept:
        limits = f"{prompt_tokens} tokens of a prompt and {response_tokens} of a response"
        raise UserError(
            f"data: none of {len(loaded.examples):,} examples fits {limits}; wanted larger limits "
            "(config.data.prompt_tokens, config.data.response_tokens)"
        )
    too_long = loaded.counts.too_long + len(loaded.examples) - len(kept)
    return Loaded(kept, dataclasses.replace(loaded.counts, kept=len(kept), too_long=too_long))
