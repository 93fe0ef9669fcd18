"""Readers of the original files, on small files in their exact forms; and what is counted.

The functions below write these files; test_tfds.py uses them, too.
"""

import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from oaif_jax.base.errors import UserError
from oaif_jax.base.text import printable
from oaif_jax.data import readers
from oaif_jax.data.records import Counts, Example, Loaded, Message, RecordError, by_majority, use_as, within

HI = (Message("user", "Hi"),)


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --- the files of each data set


def post(title: str = "a title", text: str = "I did it.\nThen é 漢字 🙂.", summary: str = " did it ") -> dict:
    return {"id": "t3_1k8x0s", "subreddit": "tifu", "title": title, "post": text, "summary": summary}


def comparison(choice: object = 0, split: str = "train", summaries=(" a cat", " a dog "), **info: object) -> dict:
    info = {"id": "t3_2vwp1w", "post": "My pet ran away.\n", "title": "pets", "subreddit": "pets", **info}
    both = [{"text": text, "policy": "sup2", "note": ""} for text in summaries]
    extra = {"confidence": 7}
    return {"info": info, "summaries": both, "choice": choice, "worker": "w", "batch": "batch3", "split": split,
            "extra": extra}  # fmt: skip


def write_tldr(root: pathlib.Path) -> pathlib.Path:
    for split in ("train", "valid", "test"):
        lines = json_lines(post(split), post(split, "another"), post(""))
        write(root / "tldr_3_filtered" / f"{split}.jsonl", lines)
    folder = root / "comparisons"
    write(folder / "batch3.json", json_lines(comparison(0), comparison(1, post="q"), comparison(0, "valid1")))
    write(folder / "batch22.json", json_lines(comparison(1, "valid2", post="v"), comparison(1)))
    write(folder / "batch0_cnndm.json", json_lines({"info": {"article": "news", "site": "cnn"}, "split": "valid2"}))
    return root


PROMPT = '\n\nHuman: Hi\n\nAssistant: Hello.\nWhat is it?\n\nHuman: How do I say "Human: x" in French? 🙂'


def dialogue(chosen: str = " Comme ça.", rejected: str = " No. ", prompt: str = PROMPT) -> dict:
    return {"chosen": f"{prompt}\n\nAssistant:{chosen}", "rejected": f"{prompt}\n\nAssistant:{rejected}"}


def write_hh(root: pathlib.Path) -> pathlib.Path:
    for name in ("helpful-base", "harmless-base"):
        for split in ("train", "test"):
            lines = json_lines(dialogue(), dialogue(f" {name}"), dialogue(f" {split}", prompt="\n\nHuman: Why?"))
            write(root / name / f"{split}.jsonl.gz", lines)
    return root


def rated(
    chosen: str = "Bread.", rejected: str = "Stone. ", prompt: str = "What do I eat? é", system: str = ""
) -> dict:
    start = [{"role": "system", "content": system}] if system else []
    start.append({"role": "user", "content": prompt})
    good, bad = ([*start, {"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": prompt, "prompt_id": "a1", "chosen": good, "rejected": bad, "messages": good,
            "score_chosen": 8.5, "score_rejected": 3.0}  # fmt: skip


def table(path: pathlib.Path, *records: dict) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def write_ultrafeedback(root: pathlib.Path) -> pathlib.Path:
    table(root / "data" / "train_prefs-00000-of-00002-ab12.parquet", rated(), rated("Soup.", system="Be brief."))
    table(root / "data" / "train_prefs-00001-of-00002-cd34.parquet", rated("Rice."))
    table(root / "data" / "test_prefs-00000-of-00001.parquet", rated(prompt="Tea?"))
    table(root / "data" / "train_sft-00000-of-00001.parquet", rated())
    table(root / "data" / "train_gen-00000-of-00001.parquet", rated())
    return root


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


# --- TL;DR


def test_tldr_posts(tmp_path):
    loaded = readers.read("tldr_posts", write_tldr(tmp_path) / "tldr_3_filtered", "valid")
    text = "SUBREDDIT: r/tifu\n\nTITLE: valid\n\nPOST: I did it.\nThen é 漢字 🙂.\n\nTL;DR:"
    assert loaded.examples[0] == Example(user(text), reference="did it", source="valid.jsonl:1")
    assert [example.source for example in loaded.examples] == [f"valid.jsonl:{i}" for i in (1, 2, 3)]
    assert loaded.counts == Counts(kept=3)


def test_tldr_comparisons(tmp_path):
    """Splits are mixed in the files, and batches about news aren't read. Raters who contradict each other say nothing."""
    folder = write_tldr(tmp_path) / "comparisons"
    train = readers.read("tldr_comparisons", folder, "train")
    text = "SUBREDDIT: r/pets\n\nTITLE: pets\n\nPOST: My pet ran away.\n\n\nTL;DR:"
    (q,) = train.examples
    assert q == Example(user(text.replace("My pet ran away.\n", "q")), "a dog", "a cat", source="batch3.json:2")
    assert train.counts == Counts(kept=1, tied=2)
    valid = readers.read("tldr_comparisons", folder, "valid").examples
    found = {example.source: (example.chosen, example.rejected) for example in valid}
    assert found == {"batch22.json:1": ("a dog", "a cat"), "batch3.json:3": ("a cat", "a dog")}
    # The two of train and the one of valid1 about the same post: two of three.
    every = readers.read("tldr_comparisons", folder)
    assert every.counts == Counts(kept=3, duplicate=1, outvoted=1)
    assert {example.chosen for example in every.examples if example.prompt == user(text)} == {"a cat"}
    prompts = readers.read("tldr_comparisons", folder, "train", use="prompts")
    assert prompts.counts == Counts(kept=2, duplicate=1)
    with pytest.raises(UserError, match="split='test', wanted valid, train, valid1, valid2"):
        readers.read("tldr_comparisons", folder, "test")


# --- HH


def test_hh(tmp_path):
    """ "Human:" inside of what is said is no turn, and the spaces around are dropped."""
    loaded = readers.read("hh", write_hh(tmp_path) / "helpful-base", "train")
    prompt = (
        Message("user", "Hi"),
        Message("assistant", "Hello.\nWhat is it?"),
        Message("user", 'How do I say "Human: x" in French? 🙂'),
    )
    assert loaded.examples == [
        Example(prompt, "Comme ça.", "No.", source="train.jsonl.gz:1"),
        Example(prompt, "helpful-base", "No.", source="train.jsonl.gz:2"),
        Example(user("Why?"), "train", "No.", source="train.jsonl.gz:3"),
    ]


def test_hh_empty_response(tmp_path):
    """One response may be empty."""
    file = write(tmp_path / "train.jsonl", json_lines(dialogue("", "\n", prompt="Human: Hi") | {"chosen": PROMPT}))
    with pytest.raises(UserError, match="last message of chosen is the user's, wanted the assistant's"):
        readers.read("hh", file)
    write(file, json_lines(dialogue("", " b")))
    assert readers.read("hh", file).examples[0].responses == ("", "b")


@pytest.mark.parametrize(
    ("told", "prompt", "chosen"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", ["a"], "b\n\nc"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant:c\n\nAssistant: d", ["a"], "b\n\nc\n\nd"),
        ("\n\nHuman: a\n\nAssistant:\n\nAssistant: c", ["a"], "c"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", ["a\n\nb"], "c"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: e", ["a", "b\n\nc", "d"], "e"),
    ],
)
def test_hh_turns_that_run_on(tmp_path, told, prompt, chosen):
    """As in 9 of the 2,312 rows of harmless-base: nothing that was said is lost, and the rows are read by default."""
    record = {"chosen": told, "rejected": told + " No."}
    (example,) = readers.read("hh", write(tmp_path / "a.jsonl", json_lines(record))).examples
    assert [message.content for message in example.prompt] == prompt
    assert [message.role for message in example.prompt] == ["user", "assistant", "user"][: len(prompt)]
    assert (example.chosen, example.rejected) == (chosen, f"{chosen} No.")


def test_hh_root_has_two_data_sets(tmp_path):
    with pytest.raises(UserError, match=r"wanted one data set of it: .*helpful-base or .*harmless-base"):
        readers.read("hh", write_hh(tmp_path), "train")


# --- UltraFeedback


def test_ultrafeedback_splits(tmp_path):
    """Shards in their order; what a split is for is in its name."""
    root = write_ultrafeedback(tmp_path)
    pairs = readers.read("ultrafeedback", root, "train_prefs").examples
    assert [(example.chosen, example.rejected) for example in pairs] == [
        ("Bread.", "Stone. "), ("Soup.", "Stone. "), ("Rice.", "Stone. ")
    ]  # fmt: skip
    assert pairs[1].prompt == (Message("system", "Be brief."), *user("What do I eat? é"))
    assert pairs[2].source == "train_prefs-00001-of-00002-cd34.parquet:1"
    assert readers.read("ultrafeedback", root / "data", "test_prefs").examples[0].prompt == user("Tea?")
    (reference,) = readers.read("ultrafeedback", root, "train_sft").examples
    assert (reference.prompt, reference.responses) == (user("What do I eat? é"), ("Bread.",))
    (prompt,) = readers.read("ultrafeedback", root, "train_gen").examples
    assert (prompt.prompt, prompt.responses) == (user("What do I eat? é"), ())


@pytest.mark.parametrize("name", ["train_prefs.jsonl", "train_prefs.jsonl.gz"])
def test_ultrafeedback_json_is_the_table(tmp_path, name):
    """The same records in both forms."""
    records = [rated(), rated("Soup.", system="Be brief."), rated(prompt="x")]
    file = write(tmp_path / name, json_lines(*records))
    other = table(tmp_path / "train_prefs.parquet", *records)
    without = lambda loaded: [(e.prompt, e.chosen, e.rejected) for e in loaded.examples]  # noqa: E731
    assert without(readers.read("ultrafeedback", file)) == without(readers.read("ultrafeedback", other))


def test_ultrafeedback_files_that_cannot_be_read(tmp_path):
    root = write_ultrafeedback(tmp_path)
    file = root / "data" / "test_prefs-00000-of-00001.parquet"
    write(file, file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"test_prefs.*can't be read .*wanted a parquet file"):
        readers.read("ultrafeedback", root, "test_prefs")
    (root / "data" / "train_prefs-00000-of-00002-ab12.parquet").unlink()
    with pytest.raises(UserError, match="wanted one file, or all shards"):
        readers.read("ultrafeedback", root, "train_prefs")
    with pytest.raises(UserError, match="its name doesn't say what it holds"):
        readers.read("ultrafeedback", table(tmp_path / "mine.parquet", rated()))


def test_scores_that_do_not_prefer(tmp_path):
    """Equal scores, and those against the label: counted, and never a preference. Their prompts are good."""
    records = [
        rated(),
        {**rated("b"), "score_rejected": 8.5},
        {**rated("c"), "score_rejected": 9},
        {**rated("d", prompt="e"), "score_chosen": 3},
        {**rated("e"), "score_chosen": None},
        {**rated("f", "f"), "score_rejected": 9.5},
    ]
    for file in (
        table(tmp_path / "a_prefs.parquet", *records),
        write(tmp_path / "b_prefs.jsonl", json_lines(*records)),
    ):
        loaded = readers.read("ultrafeedback", file)
        assert loaded.counts == Counts(kept=2, tied=2, reversed=1, identical=1)
        assert str(loaded.counts) == "2 kept, 1 identical, 2 tied, 1 reversed"
        assert [example.chosen for example in loaded.examples] == ["Bread.", "e"]
        prompts = readers.read("ultrafeedback", file, use="prompts")
        assert prompts.counts == Counts(kept=2, duplicate=4)
        assert use_as(prompts, "prompts") == prompts


def rows_with(values: list, column: str = "content") -> pyarrow.Table:
    """A table of prompts, with one value of each that no check of its own has passed."""
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())
    role = pyarrow.array(["user"] * len(values))
    both = {"role": role, "content": pyarrow.array(["p"] * len(values))} | {column: texts}
    turns = [
        pyarrow.StructArray.from_arrays([both["role"], both["content"]], ["role", "content"]),
        pyarrow.StructArray.from_arrays(
            [pyarrow.array(["assistant"] * len(values)), pyarrow.array(["a"] * len(values))], ["role", "content"]
        ),
    ]
    every = pyarrow.concat_arrays(turns)
    order = [i for row in range(len(values)) for i in (row, row + len(values))]
    offsets = pyarrow.array(range(0, 2 * len(values) + 1, 2), pyarrow.int32())
    return pyarrow.table({"chosen": pyarrow.ListArray.from_arrays(offsets, every.take(pyarrow.array(order)))})


@pytest.mark.parametrize(
    ("value", "reason", "said"),
    [
        (b"\xff\xfe", "not UTF-8", "not UTF-8"),
        (b"\xed\xa0\xbd", "not UTF-8", "not UTF-8"),
        (b"x" * (2**24 + 1), "too large", "more than 16 MiB"),
    ],
    ids=["no text", "half a character", "too large"],
)
def test_values_of_a_table_that_cannot_be_read(tmp_path, value, reason, said):
    """The row's number, or a count; the rows around it are what they are."""
    file = tmp_path / "train_gen.parquet"
    parquet.write_table(rows_with([b"one", value, b"three"]), file)
    with pytest.raises(UserError, match=rf"train_gen\.parquet:2: {said}.*on_error=skip"):
        readers.read("ultrafeedback", file)
    loaded = readers.read("ultrafeedback", file, on_error="skip")
    assert [example.prompt for example in loaded.examples] == [user("one"), user("three")]
    assert [example.source for example in loaded.examples] == [f"{file.name}:1", f"{file.name}:3"]
    assert loaded.counts == Counts(kept=2, malformed={reason: 1})


def test_columns_that_nobody_asks_for(tmp_path):
    """A date that Python can't hold is malformed where it is asked for, and only there."""
    date = pyarrow.array([2**60, 1], pyarrow.timestamp("us"))
    file = table(tmp_path / "a_prefs.parquet", rated(), rated("b"))
    parquet.write_table(parquet.read_table(file).append_column("at", date), file)
    assert readers.read("ultrafeedback", file).counts == Counts(kept=2)
    plain = parquet.read_table(file).drop_columns(["at", "score_chosen"])
    parquet.write_table(plain.append_column("score_chosen", date), file)
    with pytest.raises(UserError, match=r"no examples in it .*2 malformed \(1 no value, 1 wrong type\)"):
        readers.read("ultrafeedback", file, on_error="skip")


def test_a_line_without_an_end_takes_no_memory(tmp_path):
    """200 MB between two records."""
    first, second = json_lines({"prompt": "a"}), json_lines({"prompt": "b"})
    file = write(tmp_path / "a.jsonl.gz", first + bytes(200_000_000) + b"\n" + second)
    tracemalloc.start()
    loaded = readers.read("prompts", file, on_error="skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.counts == Counts(kept=2, malformed={"too large": 1})
    assert [example.source for example in loaded.examples] == ["a.jsonl.gz:1", "a.jsonl.gz:3"]
    assert peak < 100e6


def test_columns_are_checked(tmp_path):
    record = {key: value for key, value in rated().items() if key != "rejected"}
    with pytest.raises(UserError, match=r"train_prefs\.parquet:1: there's no key 'rejected'"):
        readers.read("ultrafeedback", table(tmp_path / "train_prefs.parquet", record))


# --- plain files


def test_plain(tmp_path):
    turns = [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "x"},
    ]
    file = write(tmp_path / "a.jsonl", json_lines({"prompt": " Hi\u2028"}, {"prompt": turns, "other": 1}))
    given = tuple(Message(**turn) for turn in turns)
    assert [e.prompt for e in readers.read("prompts", file).examples] == [user(" Hi\u2028"), given]
    file = write(tmp_path / "b.jsonl.gz", json_lines({"prompt": "p", "response": " r "}))
    assert readers.read("references", file).examples == [Example(user("p"), reference=" r ", source="b.jsonl.gz:1")]
    write(tmp_path / "c" / "train.jsonl", json_lines({"prompt": "p", "chosen": "a ", "rejected": ""}))
    assert readers.read("pairs", tmp_path / "c", "train").examples == [Example(user("p"), "a ", source="train.jsonl:1")]


def test_byte_order_mark_and_crlf(tmp_path):
    """Both are of other editors, and say nothing."""
    crlf = json_lines({"prompt": "a\r\nb"}, {"prompt": "c"}).replace(b"\n", b"\r\n")
    file = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + crlf)
    assert [e.prompt for e in readers.read("prompts", file).examples] == [user("a\r\nb"), user("c")]


# --- what is wrong with a record

WRONG = [  # format, line, reason, said
    ("prompts", b'{"prompt": "p"', "not JSON", "not JSON"),
    ("prompts", b"", "not JSON", "not JSON"),
    ("prompts", b'{"prompt": "\xff"}', "not UTF-8", "not UTF-8"),
    ("prompts", rb'{"prompt": "\ud83d"}', "not Unicode", "prompt has half a character"),
    ("prompts", b'{"prompt": "p", "n": ' + b"7" * 5000 + b"}", "not JSON", "a number of thousands of digits"),
    ("prompts", b"[" * 100_000, "not JSON", "inside of each other too deep"),
    ("prompts", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "wrong type", "message 1 of prompt is a list"),
    ("prompts", b'{"' + b"x" * 10**6 + b'": 1}', "missing key", "there's no key 'prompt'; there are xxx"),
    ("prompts", rb'{"\u001b[31mprompt\ud83d": "p"}', "missing key", r"there's no key 'prompt'"),
    ("prompts", {"prompt": [{"role": "x" * 10**6, "content": "p"}]}, "role", "has role 'xxx"),
    ("prompts", b'{"prompt": "' + b"x" * 2**24 + b'"}', "too large", "more than 16 MiB in one record"),
    ("prompts", b'["p"]', "wrong type", "the line is a list, wanted an object"),
    ("prompts", {"prompts": "p"}, "missing key", "there's no key 'prompt'; did you mean 'prompts'?"),
    ("prompts", {"prompt": None}, "wrong type", "prompt is null, wanted a text or a list of messages"),
    ("prompts", {"prompt": ["p"]}, "wrong type", "message 1 of prompt is a text, wanted an object"),
    ("prompts", {"prompt": [{"role": "user"}]}, "missing key", "there's no key 'content'"),
    ("prompts", {"prompt": [{"role": "human", "content": "p"}]}, "role", "message 1 of prompt has role 'human'"),
    ("prompts", {"prompt": []}, "turns", "the last message of prompt is none, wanted the user's"),
    ("prompts", {"prompt": [{"role": "system", "content": "p"}]}, "turns", "is none, wanted the user's"),
    ("prompts", {"prompt": " \n\t"}, "empty", "the last message of prompt by the user is empty, wanted a prompt"),
    ("references", {"prompt": "p"}, "missing key", "there's no key 'response'"),
    ("references", {"prompt": "p", "response": 3}, "wrong type", "response is a number, wanted a text"),
    ("pairs", {"prompt": "p", "chosen": "a", "rejected": ["b"]}, "wrong type", "rejected is a list, wanted a text"),
    ("pairs", {"prompt": "p", "chosen": "", "rejected": ""}, "empty", "chosen and rejected are both empty"),
    ("tldr_posts", post(text=" \n"), "empty", "wanted a prompt"),
    ("tldr_posts", {**post(), "title": None}, "wrong type", "title is null, wanted a text"),
    ("tldr_comparisons", comparison(2), "choice", "choice is 2, wanted 0 or 1"),
    ("tldr_comparisons", comparison(True), "choice", "choice is True, wanted 0 or 1"),
    ("tldr_comparisons", comparison("1"), "choice", "choice is '1', wanted 0 or 1"),
    ("tldr_comparisons", comparison(split="dev"), "split", "split is 'dev', wanted one of train, valid1, valid2"),
    ("tldr_comparisons", comparison(summaries=("a", "b", "c")), "summaries", "there are 3 summaries, wanted 2"),
    ("tldr_comparisons", comparison(post=None), "wrong type", "post is null, wanted a text"),
    ("tldr_comparisons", {**comparison(), "info": []}, "wrong type", "info is a list, wanted an object"),
    ("hh", {"chosen": "Hello"}, "missing key", "there's no key 'rejected'"),
    ("hh", {**dialogue(), "chosen": "Hello"}, "turns", "chosen begins with 'Hello', wanted 'Human:'"),
    ("hh", dialogue(prompt="Assistant: Hi\n\nHuman: Hi"), "turns", "message 1 of chosen is the assistant's"),
    ("tldr_comparisons", {**comparison(), "choice": eval("[" * 50 + "]" * 50)}, "choice", "wanted 0 or 1"),
    ("hh", {**dialogue(), "rejected": PROMPT + "?\n\nAssistant: a"}, "prompts differ", "wanted the same prompt"),
    ("hh", dialogue(prompt="\n\nHuman:  "), "empty", "wanted a prompt"),
    ("ultrafeedback", {**rated(), "chosen": "Bread."}, "wrong type", "chosen is a text, wanted a list"),
    ("ultrafeedback", {**rated(), "rejected": rated(prompt="x")["chosen"]}, "prompts differ", "the same prompt"),
    ("ultrafeedback", {**rated(), "chosen": rated()["chosen"][:1]}, "turns", "wanted the assistant's"),
    ("ultrafeedback", rated(prompt=""), "empty", "wanted a prompt"),
    ("ultrafeedback", {**rated(), "score_chosen": "8.5"}, "wrong type", "score_chosen is a text, wanted a number"),
    ("ultrafeedback", {**rated(), "score_rejected": float("nan")}, "wrong type", "score_rejected is nan, wanted a number"),
]  # fmt: skip
GOOD = {
    "prompts": [{"prompt": "a"}, {"prompt": "b"}],
    "references": [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": ""}],
    "pairs": [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "y", "rejected": "x"}],
    "tldr_posts": [post(), post("b")],
    "tldr_comparisons": [comparison(), comparison(1, post="q")],
    "hh": [dialogue(), dialogue(" b")],
    "ultrafeedback": [rated(), rated("b")],
}


def as_line(record: dict | bytes) -> bytes:
    return record + b"\n" if isinstance(record, bytes) else json_lines(record)


@pytest.mark.parametrize(("format", "record", "reason", "said"), WRONG, ids=[f"{w[0]}-{w[3]}" for w in WRONG])
def test_wrong_records(tmp_path, format, record, reason, said):
    """Named with file and line; or skipped and counted, and then the rest is what it is without them."""
    first, second = map(as_line, GOOD[format])
    file = write(tmp_path / "train_prefs.jsonl.gz", first + as_line(record) + second)
    with pytest.raises(UserError) as error:
        readers.read(format, file)
    assert str(error.value).startswith(f"{file}:2: "), error.value
    assert said in str(error.value)
    assert "on_error=skip" in str(error.value)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)
    skipped = readers.read(format, file, on_error="skip")
    good = readers.read(format, write(file, first + second))
    assert [(e.prompt, *e.responses) for e in skipped.examples] == [(e.prompt, *e.responses) for e in good.examples]
    assert [example.source[-2:] for example in skipped.examples] == [":1", ":3"]
    expected = Counts(kept=2, empty=1) if reason == "empty" else Counts(kept=2, malformed={reason: 1})
    assert (skipped.counts, good.counts) == (expected, Counts(kept=2))


# --- what is wrong with files and arguments


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(json_lines(*({"prompt": str(i)} for i in range(99))))[:-12]),
        ("a.jsonl.gz", b"no gzip at all"),
    ],
    ids=["broken off", "no gzip"],
)
def test_files_that_cannot_be_read(tmp_path, name, content, on_error):
    """Whatever is to be skipped: half a file is not a line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"data .*{name} can't be read"):
        readers.read("prompts", tmp_path / name, on_error=on_error)


@pytest.mark.parametrize(
    ("format", "path", "split", "on_error", "said"),
    [
        ("pair", "train.jsonl", "", "raise", "format='pair' doesn't exist; did you mean 'pairs'?"),
        ("pairs", "train.jsonl", "", "warn", "on_error='warn', wanted raise or skip"),
        ("pairs", "none", "", "raise", "none: no such file or directory"),
        ("pairs", "train.jsonl", "train", "raise", "is a file, wanted its directory, or no split"),
        ("pairs", "", "trian", "raise", "split='trian': not in .*; did you mean 'train'?"),
        ("pairs", "", "", "raise", "split='': not in .*; there are both, train"),
        ("pairs", "", "both", "raise", "has both.jsonl, both.jsonl.gz; wanted one file"),
        ("ultrafeedback", "empty", "train_prefs", "raise", "no files in it that end in .parquet or .jsonl"),
        ("tldr_comparisons", "", "train", "raise", r"no batch\*.json in it"),
        ("pairs", "train.jsonl", "", "skip", r"no examples in it as pairs \(1 malformed \(1 missing key\)\)"),
        ("tfds", "", "train", "raise", "no prepared data set"),
        *((format, "x" * 300, "train", "raise", r"x can't be read \(File name too long\)") for format in readers.FORMATS),
    ],
)  # fmt: skip
def test_arguments(tmp_path, format, path, split, on_error, said):
    for name in ("train.jsonl", "both.jsonl", "both.jsonl.gz"):
        write(tmp_path / name, json_lines({"prompt": "p"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        readers.read(format, tmp_path / path, split, on_error)


# --- counts, uses, limits


def test_duplicates_and_identical_pairs(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    turned, same = {**pair, "chosen": "b", "rejected": "a"}, {**pair, "chosen": "b"}
    loaded = readers.read("pairs", write(tmp_path / "a.jsonl", json_lines(pair, same, pair, turned, same, pair)))
    assert loaded.counts == Counts(kept=1, identical=2, duplicate=2, outvoted=1)
    assert loaded.examples == [Example(user("p"), "a", "b", source="a.jsonl:1")]


@pytest.mark.parametrize(
    ("votes", "chosen", "counts"),
    [
        ("aab", "a", Counts(kept=1, duplicate=1, outvoted=1)),
        ("baaa", "a", Counts(kept=1, duplicate=2, outvoted=1)),
        ("bbab", "b", Counts(kept=1, duplicate=2, outvoted=1)),
        ("abab", "", Counts(tied=4)),
        ("ab", "", Counts(tied=2)),
        ("b", "b", Counts(kept=1)),
    ],
)
def test_several_raters_of_a_pair(tmp_path, votes, chosen, counts):
    """The majority of three files' raters, in whatever order both were shown; a tie is nobody's preference."""
    for number in range(3):
        lines = [comparison("ab".index(vote), summaries=("a", "b")) for vote in votes[number::3]]
        lines = [comparison(1 - line["choice"], summaries=("b", "a")) if number else line for line in lines]
        other = comparison(post=f"other {number}")
        write(tmp_path / f"batch{number}.json", json_lines(*lines, other))
    loaded = readers.read("tldr_comparisons", tmp_path)
    assert loaded.counts == dataclasses.replace(counts, kept=counts.kept + 3)
    assert [e.chosen for e in loaded.examples if "other" not in e.prompt[0].content] == [chosen] * bool(chosen)
    assert sum(value for value in dataclasses.asdict(loaded.counts).values() if value) == len(votes) + 3


def test_majority_keeps_the_order_of_files(tmp_path):
    """What is kept stands where its first record stood."""
    of = lambda prompt, chosen, rejected: {"prompt": prompt, "chosen": chosen, "rejected": rejected}  # noqa: E731
    lines = [of("p", "a", "b"), of("q", "a", "b"), of("p", "b", "a"), of("r", "a", "b"), of("p", "b", "a")]
    loaded = readers.read("pairs", write(tmp_path / "a.jsonl", json_lines(*lines)))
    assert [example.source for example in loaded.examples] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert by_majority(loaded.examples) == (loaded.examples, {"duplicate": 0})


PAIRS = Loaded(
    [
        Example(HI, "a", "b", source="x:1"),
        Example(HI, "b", "c", source="x:2"),
        Example(user("p"), "", "b", source="x:3"),
    ],
    Counts(kept=3, duplicate=1),
)


def test_uses():
    prompts = use_as(PAIRS, "prompts")
    assert prompts.examples == [Example(HI, source="x:1"), Example(user("p"), source="x:3")]
    assert prompts.counts == Counts(kept=2, duplicate=2)
    references = use_as(PAIRS, "references")
    assert [example.reference for example in references.examples] == ["a", "b"]
    assert references.counts == Counts(kept=2, empty=1, duplicate=1)
    assert use_as(PAIRS, "pairs") == PAIRS
    for use in ("references", "pairs"):
        with pytest.raises(UserError, match=use):
            use_as(prompts, use)
    with pytest.raises(UserError, match=r"use='pair' doesn't exist; did you mean 'pairs'\?"):
        use_as(PAIRS, "pair")


def test_within():
    """At the limits is within; what is too long is counted once, be it the prompt or the response."""
    examples = [Example(user("p" * p), reference="r" * r) for p, r in ((3, 2), (4, 2), (3, 3), (4, 3), (1, 1))]
    lengths = lambda example: (len(example.prompt[0].content), max(map(len, example.responses), default=0))  # noqa: E731
    kept = within(Loaded(examples, Counts(kept=5, empty=1)), lengths, 3, 2)
    assert kept == Loaded([examples[0], examples[4]], Counts(kept=2, empty=1, too_long=3))
    with pytest.raises(UserError, match="none of 5 examples fits 0 tokens of a prompt and 2 of a response"):
        within(Loaded(examples, Counts(kept=5)), lengths, 0, 2)


def test_counts_in_words():
    counts = Counts(kept=12345, empty=1, too_long=2, malformed={"turns": 3, "not JSON": 1})
    assert str(counts) == "12,345 kept, 1 empty, 2 too long, 4 malformed (1 not JSON, 3 turns)"
    assert str(Counts()) == "nothing"


def test_reason_of_an_error():
    assert RecordError("turns", "message").reason == "turns"


# --- the command line


def command(*arguments: str) -> subprocess.CompletedProcess:
    root = pathlib.Path(__file__).resolve().parent.parent
    line = [sys.executable, "-m", "oaif_jax.data", *arguments]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)


def test_show(tmp_path):
    """The counts, and the first three examples as they are: brackets are text and no markup."""
    lines = [dialogue(f" [bold]{i}[/x]") for i in range(4)]
    write(tmp_path / "train.jsonl.gz", json_lines(*lines, lines[0]) + b"{}\n")
    done = command("show", "--format=hh", f"--path={tmp_path}", "--split=train", "--on_error=skip")
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.splitlines()
    assert shown[0] == "4 kept, 1 duplicate, 1 malformed (1 missing key)"
    assert [line for line in shown if line.startswith("chosen")] == [f"chosen  [bold]{i}[/x]" for i in range(3)]
    assert sum("train.jsonl.gz:" in line for line in shown) == 3


HOSTILE = "\x1b]0;title\x07\x1b[2J \x9b31m \u202eabc\u2066 a\rb \x08 \u200b\u2028 :warning: é 漢字 👨\u200d👩"


def test_nothing_of_data_reaches_the_terminal_raw(tmp_path):
    """Control characters and marks of direction, in texts, in keys that errors quote, and in names of files."""
    file = write(tmp_path / "a\x1b[31m.jsonl", json_lines({"prompt": HOSTILE}, {HOSTILE: 1}))
    done = command("show", "--format=prompts", f"--path={file}", "--on_error=skip")
    assert done.returncode == 0
    for text in (
        r"\x1b]0;title\x07",
        r"\x9b31m",
        r"\u202eabc",
        r"a\rb",
        r"\u2028",
        ":warning: é 漢字 👨\u200d👩",
        r"a\x1b[31m.jsonl",
    ):
        assert text in done.stdout.replace("\n", " "), text
    failed = command("show", "--format=prompts", f"--path={file}")
    assert failed.returncode == 2
    assert r"a\x1b[31m.jsonl:2: there's no key 'prompt'" in failed.stderr
    for shown in (done.stdout, failed.stderr):
        assert all(char.isprintable() or char in "\n\u200d" for char in shown), repr(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\a", r"\x1b[31mred\x07"),
        ("one\n\ttwo", "one\n\ttwo"),
        ("\u00a0\u3000", "\u00a0\u3000"),
        ("\u200cمی\u200dخ", "\u200cمی\u200dخ"),
        ("\u202e\u2066\u200f\ufeff\ud83d", r"\u202e\u2066\u200f\ufeff\ud83d"),
        ("\x00\x7f\x85\x9b\x1c\x0b\r", r"\x00\x7f\x85\x9b\x1c\x0b\r"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format=hh"], "no command, wanted `python -m oaif_jax.data show ...` or `prepare ...`"),
        (["shw", "--format=hh"], "'shw' is no command; did you mean 'show'?"),
        (["show", "--format=hh"], "--path is missing, wanted the file, or the directory in its original layout"),
        (["show", "--format=hh", "--pth=x"], "--pth doesn't exist; did you mean 'path'?"),
        (["show", "--format=hh", "--path=none"], "data none: no such file or directory"),
    ],
)
def test_command_errors(arguments, said):
    done = command(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
