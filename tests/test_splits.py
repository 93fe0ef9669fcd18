"""Files parted into training, validation and test: no prompt in two of them, every example in one or counted."""

import collections
import itertools
import json
import pathlib
import random
import re

import fakes
import numpy as np
import pytest

from oaif_jax.base.errors import UserError
from oaif_jax.config import Data, Eval
from oaif_jax.data import open as open_data
from oaif_jax.data import splits
from oaif_jax.data.chat import ChatTemplate
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.records import Example, Message
from oaif_jax.data.voice import Voice


class Bytes(fakes.ByteTokenizer):
    """One that is asked for special tokens, and has none."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        return super().encode(text)

    def ordinary_parts(self, text: str) -> list[str]:
        return [text]

    @property
    def bos_id(self) -> None:
        return None


TOKENIZER = Bytes()
VOICE = Voice(TOKENIZER, ChatTemplate(TOKENIZER.path, ""), TOKENIZER.stop_ids, spaced=True)
SPLITS = ("train", "validation", "test")


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def pair(prompt: str, number: int) -> dict:
    return {"prompt": prompt, "chosen": f"good {number}", "rejected": f"bad {number}"}


def write(path: pathlib.Path, records: list[dict]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(path: pathlib.Path, reads: str = "pairs", *, prompts: int = 8, portions: int = 1, **section) -> DataSet:
    names = {"name": reads, "held_out": 10, "train_posts": 0, "prompt_tokens": 40, "response_tokens": 20}
    evaluation = Eval(prompts=prompts, final_prompts=prompts)
    return open_data.texts(Data(path=str(path), **names | section), evaluation, VOICE, reads, portions=portions)


def prompts_of(data: DataSet) -> dict[str, list]:
    return {name: [example.prompt for example in data.splits[name]] for name in SPLITS}


def assert_disjoint(data: DataSet) -> None:
    """No prompt is in two splits, and evaluations see each once."""
    prompts = prompts_of(data)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(prompts[one]) & set(prompts[other]), (one, other)
    for name in ("validation", "test"):
        assert len(set(prompts[name])) == len(prompts[name])


def said(data: DataSet) -> tuple[int, dict[str, int]]:
    """The examples of train and the others, as the note counts them."""
    train = next(part for note in data.notes for part in note.split("; ") if part.startswith("train: "))
    kept, _, left = train.removeprefix("train: ").partition(" examples, and not ")
    counts = re.findall(r"([\d,]+) ([a-z].*?)(?:, (?=\d)|$)", left)
    return int(kept.replace(",", "")), {reason: int(count.replace(",", "")) for count, reason in counts}


@pytest.fixture
def several(tmp_path) -> pathlib.Path:
    """Pairs of 60 prompts, of which some have twelve times as many as others."""
    rng = np.random.default_rng(0)
    counts = np.maximum(rng.permutation(np.arange(60) * 0.2).astype(int), 1)
    records = [pair(f"prompt {i}", number) for i, count in enumerate(counts) for number in range(count)]
    return write(tmp_path / "pairs.jsonl", records)


def test_distinct_prompts_are_held_out(several):
    """As many prompts as are asked for, whatever the number of pairs of each; every pair is in a split or counted."""
    records = [json.loads(line) for line in several.read_text().splitlines()]
    data = opened(several)
    assert_disjoint(data)
    assert [len(data.splits[name]) for name in ("validation", "test")] == [10, 10]
    assert len(set(prompts_of(data)["train"])) == 40
    kept, left = said(data)
    assert kept == len(data.splits["train"])
    assert kept + sum(left.values()) == len(records)
    assert left["held out"] == 20
    of = collections.Counter(record["prompt"] for record in records)
    assert kept == sum(of[prompt[0].content] for prompt in set(prompts_of(data)["train"])), (
        "all that these prompts have"
    )


def test_train_posts_and_portions_are_counted(several):
    data = opened(several, train_posts=30, portions=7)
    kept, left = said(data)
    assert (kept, left["beyond 7 equal portions"]) == (28, 2)
    assert kept + sum(left.values()) == len(several.read_text().splitlines())
    assert left["beyond config.data.train_posts=30"] > 0


@pytest.mark.parametrize("reads", ["pairs", "prompts", "references"])
def test_what_is_held_out_is_a_function_of_prompts_and_seed(tmp_path, reads):
    """Not of the order of rows, of other responses, nor of what is read of the rows; another seed takes others."""
    names = {"pairs": ("pairs", pair), "references": ("references", lambda p, n: {"prompt": p, "response": f"{n}"})}
    name, record = names.get(reads, ("pairs", pair))
    records = [record(f"prompt {i}", number) for i in range(60) for number in range(3)]
    one = opened(write(tmp_path / "one.jsonl", records), reads, name=name)
    shuffled = [*records, record("prompt 3", 9)]
    random.Random(1).shuffle(shuffled)
    other = opened(write(tmp_path / "other.jsonl", shuffled), reads, name=name)
    for split in ("validation", "test"):
        assert prompts_of(one)[split] == prompts_of(other)[split]
        assert prompts_of(opened(tmp_path / "one.jsonl", reads, name=name, seed=1))[split] != prompts_of(one)[split]
    assert set(prompts_of(one)["train"]) == set(prompts_of(other)["train"])


def test_evaluations_see_a_sample_of_distinct_prompts(tmp_path):
    """Of a named split that begins with 100 responses to one prompt, and whose rows are sorted."""
    write(tmp_path / "d" / "train.jsonl", [pair(f"train {i}", 0) for i in range(20)])
    rows = [pair("prompt 0", i) for i in range(100)] + [pair(f"prompt {i:03d}", 0) for i in range(1, 200)]
    write(tmp_path / "d" / "test.jsonl", rows)
    data = opened(tmp_path / "d", train="train", test="test")
    assert_disjoint(data)
    numbers = [int(prompt[0].content.split()[1]) for prompt in prompts_of(data)["test"]]
    assert sorted(numbers) == list(range(200))
    for count in (8, 64):
        assert 60 < np.mean(numbers[:count]) < 140
    assert numbers[:8] != sorted(numbers[:8])
    other = opened(tmp_path / "d", train="train", test="test", seed=1)
    assert prompts_of(other)["test"][:8] != prompts_of(data)["test"][:8]
    assert "test: 200 examples, and not 99 with another response to a prompt" in data.notes[-2]


def test_evaluations_of_train_do_too(several):
    """`evaluate --split=train`."""
    data = opened(several)
    train = open_data.evaluated(data, "train", 0)
    prompts = [example.prompt for example in train.splits["train"]]
    assert len(prompts) == len(set(prompts)) == 40
    assert set(prompts) == set(prompts_of(data)["train"])
    assert prompts != list(dict.fromkeys(prompts_of(data)["train"]))
    assert train.splits["test"] == data.splits["test"]
    assert open_data.evaluated(data, "test", 0) is data


def test_named_splits_that_overlap(tmp_path):
    """Test keeps a prompt of several splits, then validation; what the others lose is counted."""
    of = lambda *numbers: [pair(f"prompt {i}", n) for n, i in enumerate(numbers)]  # noqa: E731
    write(tmp_path / "train.jsonl", of(*range(30), 3, 12, 12))
    write(tmp_path / "valid.jsonl", of(*range(10, 24), 3))
    write(tmp_path / "test.jsonl", of(*range(12)))
    data = opened(tmp_path, train="train", validation="valid", test="test")
    numbers = {name: {int(prompt[0].content.split()[1]) for prompt in prompts_of(data)[name]} for name in SPLITS}
    assert numbers == {"train": {*range(24, 30)}, "validation": {*range(12, 24)}, "test": {*range(12)}}
    assert said(data) == (6, {"with prompts that are evaluated on": 27})
    assert "validation: 12 examples, and not 3 with prompts of test" in data.notes[-2]


def test_prompts_that_become_equal_tokens_are_the_same(tmp_path):
    """Spaces that a template trims: the policy would be tested on what it was trained on."""
    template = ChatTemplate(TOKENIZER.path, "{% for m in messages %}{{ m.content | trim }}{% endfor %}:")
    voice = Voice(TOKENIZER, template, TOKENIZER.stop_ids, spaced=True)
    records = [{"prompt": f"{' ' * n}prompt {i}"} for i in range(60) for n in range(3)]
    section = Data(
        name="prompts", path=str(write(tmp_path / "a.jsonl", records)), held_out=10, prompt_tokens=40, train_posts=0
    )
    data = open_data.texts(section, Eval(prompts=8, final_prompts=8), voice, "prompts")
    stripped = {name: {prompt[0].content.strip() for prompt in prompts} for name, prompts in prompts_of(data).items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not stripped[one] & stripped[other]
    assert [len(stripped[name]) for name in SPLITS] == [40, 10, 10]
    assert said(data) == (120, {"held out": 20, "with prompts that are evaluated on": 40})


def test_responses_that_become_equal_tokens_prefer_nothing(tmp_path):
    """With the space that a voice puts before an answer, " good" and "good" are one."""
    records = [pair(f"prompt {i}", i) for i in range(40)]
    records += [{"prompt": f"prompt {i}", "chosen": "same", "rejected": " same"} for i in range(5)]
    data = opened(write(tmp_path / "a.jsonl", records))
    assert "40 kept, 5 identical" in data.notes[0]
    assert all("same" not in example.chosen for name in SPLITS for example in data.splits[name])
    with pytest.raises(UserError, match="the responses of all 5 pairs are the same tokens"):
        opened(write(tmp_path / "b.jsonl", records[40:]))


def test_texts_that_cannot_fit_are_not_tokenized(tmp_path, monkeypatch):
    """A text of 10 MB takes the tokenizer gigabytes; as a prompt or as a response it is too long as it is."""
    lengths = []
    real = fakes.ByteTokenizer.encode
    monkeypatch.setattr(fakes.ByteTokenizer, "encode", lambda self, text: lengths.append(len(text)) or real(self, text))
    records = [pair(f"prompt {i}", i) for i in range(40)]
    records[3]["prompt"] = records[4]["chosen"] = "x" * 10_000_000
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    records[5]["prompt"] = turn * 10_000 + turn[:1]
    data = opened(write(tmp_path / "a.jsonl", records))
    assert "37 kept, 3 too long" in data.notes[0]
    assert max(lengths) < 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 30}, r"config.data.held_out=30: there are 60 distinct prompts, wanted more than 60"),
        ({"prompts": 11}, r"config.eval.prompts=11: validation has 10 examples with distinct prompts, wanted at most"),
        ({"portions": 5000}, r"config.data.held_out=10: nothing is left to train on"),
    ],
)
def test_too_few_prompts(several, changes, message):
    with pytest.raises(UserError, match=message):
        opened(several, **changes)


def test_splits_that_leave_nothing(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", [pair(f"prompt {i}", i) for i in range(40)])
    with pytest.raises(UserError, match=r"config\.data\.train: all its prompts are in validation or test"):
        opened(tmp_path, train="train", test="test")
    with pytest.raises(UserError, match=r"config\.data\.validation and test are both 'test'"):
        opened(tmp_path, train="train", test="test", validation="test")


def test_the_rule_is_what_its_name_says():
    """What is held out of these prompts: runs go on only under the same rule, so that another one needs another name."""
    examples = [Example(user(f"prompt {i}")) for i in range(12)]
    found, _ = splits.part({"train": examples}, lambda example: repr(example.prompt).encode(), held_out=2, seed=0)
    numbers = {name: [int(example.prompt[0].content.split()[1]) for example in found[name]] for name in found}
    assert splits.RULE == "distinct prompts by hash"
    assert (numbers["validation"], numbers["test"]) == ([10, 6], [8, 3])
