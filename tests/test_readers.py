"""Readers of the original files, on small files in their exact forms; and what is counted.

The functions below write these files; test_tfds.py uses them, too.
"""

import gzip
import json
import pathlib
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from oaif_jax.base.errors import UserError
from oaif_jax.data import readers
from oaif_jax.data.records import Counts, Example, Loaded, Message, RecordError, use_as, within

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
    write(folder / "batch22.json", json_lines(comparison(1, "valid2"), comparison(1)))
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
    """Splits are mixed in the files, and batches about news aren't read. The same judgment twice is one."""
    folder = write_tldr(tmp_path) / "comparisons"
    train = readers.read("tldr_comparisons", folder, "train")
    text = "SUBREDDIT: r/pets\n\nTITLE: pets\n\nPOST: My pet ran away.\n\n\nTL;DR:"
    found = {example.source: (example.chosen, example.rejected) for example in train.examples}
    assert found == {
        "batch22.json:2": ("a dog", "a cat"),
        "batch3.json:1": ("a cat", "a dog"),
        "batch3.json:2": ("a dog", "a cat"),
    }
    assert {example.prompt for example in train.examples} == {user(text), user(text.replace("My pet ran away.\n", "q"))}
    counts = {
        split: readers.read("tldr_comparisons", folder, split).counts for split in ("valid", "valid1", "valid2", "")
    }
    assert [counts[split].kept for split in counts] == [2, 1, 1, 3]
    assert counts[""].duplicate == 2
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
    ("hh", dialogue(prompt=PROMPT + "\n\nAssistant: a"), "turns", "message 5 of chosen is the assistant's, wanted the user's"),
    ("hh", {**dialogue(), "rejected": PROMPT + "?\n\nAssistant: a"}, "prompts differ", "wanted the same prompt"),
    ("hh", dialogue(prompt="\n\nHuman:  "), "empty", "wanted a prompt"),
    ("ultrafeedback", {**rated(), "chosen": "Bread."}, "wrong type", "chosen is a text, wanted a list"),
    ("ultrafeedback", {**rated(), "rejected": rated(prompt="x")["chosen"]}, "prompts differ", "the same prompt"),
    ("ultrafeedback", {**rated(), "chosen": rated()["chosen"][:1]}, "turns", "wanted the assistant's"),
    ("ultrafeedback", rated(prompt=""), "empty", "wanted a prompt"),
]  # fmt: skip
GOOD = {
    "prompts": [{"prompt": "a"}, {"prompt": "b"}],
    "references": [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": ""}],
    "pairs": [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "a", "chosen": "y", "rejected": "x"}],
    "tldr_posts": [post(), post("b")],
    "tldr_comparisons": [comparison(), comparison(1)],
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
    assert loaded.counts == Counts(kept=2, identical=2, duplicate=2)
    assert [example.source for example in loaded.examples] == ["a.jsonl:1", "a.jsonl:4"]


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
