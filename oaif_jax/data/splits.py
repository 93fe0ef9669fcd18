"""Examples of files parted into training, validation and test, which have no prompt in common.

Prompts are the same if they are the same tokens to the policy. They are held out, and drawn for evaluations, in the order of a
hash of their text and the data's seed: whatever the order of a file's rows, and however many responses there are to a prompt.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from oaif_jax.base.errors import UserError
from oaif_jax.data.records import Example

# How examples are parted. A run goes on only where that hasn't changed: what changes it here needs another name.
RULE = "distinct prompts by hash"

EVALUATED = ("test", "validation")  # a prompt of several splits is kept in the first of them, and never in train

Key = Callable[[Example], bytes]  # equal for examples with the same prompt


def part(
    read: Mapping[str, Sequence[Example]],
    key: Key,
    *,
    held_out: int,
    seed: int,
    train_posts: int = 0,
    portions: int = 1,
) -> tuple[dict[str, list[Example]], str]:
    """Train, validation and test, and what there is to say: how many examples each has, and why others are left out.

    `read` has train, and each of the others that a split of the files is named for. Those that it lacks get `held_out` of train's
    distinct prompts each. Validation and test have one example to a prompt, in the order of their hashes, so that the first n are
    a sample; train has all examples of its prompts in the order of the files, at most `train_posts` (0: all), of which
    `portions` equal ones are trained on in turn.
    """
    splits, said = {}, {}
    taken: set[bytes] = set()  # prompts that are evaluated on
    for name in EVALUATED:
        if name in read:
            fresh = [example for example in read[name] if key(example) not in taken]
            splits[name] = sample(fresh, key, seed)
            taken |= set(map(key, fresh))
            more = len(fresh) - len(splits[name])
            left = {"with prompts of test": len(read[name]) - len(fresh), "with another response to a prompt": more}
            said[name] = _said(name, len(splits[name]), left)
    ranked = sample([example for example in read["train"] if key(example) not in taken], key, seed)
    missing = [name for name in reversed(EVALUATED) if name not in read]  # validation's come first
    if not ranked:
        raise UserError("config.data.train: all its prompts are in validation or test, wanted others to train on")
    if len(ranked) <= held_out * len(missing):
        there = f"there are {len(ranked)} distinct prompts"
        raise UserError(f"config.data.held_out={held_out}: {there}, wanted more than {held_out * len(missing)}")
    for i, name in enumerate(missing):
        splits[name] = ranked[i * held_out : (i + 1) * held_out]
        taken |= set(map(key, splits[name]))
        said[name] = _said(name, len(splits[name]), {}) + " held out from train"
    rest = [example for example in read["train"] if key(example) not in taken]
    some = rest[: train_posts or None]
    splits["train"] = some[: len(some) - len(some) % portions]
    moved = len(missing) * held_out
    left = {
        "held out": moved,
        "with prompts that are evaluated on": len(read["train"]) - len(rest) - moved,
        f"beyond config.data.train_posts={train_posts}": len(rest) - len(some),
        f"beyond {portions} equal portions": len(some) - len(splits["train"]),
    }
    said["train"] = _said("train", len(splits["train"]), left)
    return splits, "; ".join(said[name] for name in ("train", "validation", "test"))


def sample(examples: Sequence[Example], key: Key, seed: int) -> list[Example]:
    """An example of each distinct prompt, in the order of their hashes: of any size, the first n are a seeded sample. It is the
    prompt's first one; where its pairs were judged by several instructions, the first one by any of these, as a hash has it."""
    first: dict[bytes, Example] = {}
    ranks: dict[bytes, bytes] = {}
    for example in examples:
        same = key(example)
        before = first.setdefault(same, example)
        is_other = example.instruction != before.instruction
        if is_other and _turn(same, example, seed) < _turn(same, before, seed):
            first[same] = example
        rank = _rank(example, seed)
        ranks[same] = min(rank, ranks.get(same, rank))
    return [first[same] for same in sorted(first, key=lambda same: ranks[same])]


def _rank(example: Example, seed: int) -> bytes:
    """A place of a prompt's text among all texts."""
    text = json.dumps([seed, [[message.role, message.content] for message in example.prompt]])
    return hashlib.sha256(text.encode()).digest()


def _turn(same: bytes, example: Example, seed: int) -> bytes:
    """A place of an instruction among all those of a prompt."""
    return hashlib.sha256(json.dumps([seed, same.hex(), example.instruction]).encode()).digest()


def _said(name: str, kept: int, left: Mapping[str, int]) -> str:
    """In: "train", 7, {"held out": 2, "with ...": 0}. Out: "train: 7 examples, and not 2 held out"."""
    there = [f"{count:,} {reason}" for reason, count in left.items() if count]
    return f"{name}: {kept:,} examples" + (f", and not {', '.join(there)}" if there else "")
