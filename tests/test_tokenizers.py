"""Tokenizers of released forms: ids and back, which ids have a meaning, files that can't be used, and joined texts."""

import copy
import json
import pathlib
import pickle
import random
import re
from collections.abc import Sequence

import fakes
import pytest
import tokenizer_files as files
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from oaif_jax.base.errors import UserError
from oaif_jax.data import joining
from oaif_jax.data.tokenizer import Tokenizer, open_tokenizer

LLAMA_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
SYMBOLS = ("<start_of_turn>", "<end_of_turn>", "<table>")
GEMMA_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": list(SYMBOLS[:2])}
KINDS = (*files.FAMILIES, "sentencepiece prefix", "sentencepiece symbols")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Tokenizer]:
    """One of each kind, opened by its directory."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in files.FAMILIES.items():
        make(root / name)
    files.sentencepiece_model(root / "sentencepiece prefix" / "tokenizer.model", prefix=True)
    files.write_json(root / "sentencepiece prefix" / "tokenizer_config.json", LLAMA_CONFIG)
    files.sentencepiece_model(root / "sentencepiece symbols" / "tokenizer.model", prefix=False, symbols=SYMBOLS)
    files.write_json(root / "sentencepiece symbols" / "tokenizer_config.json", GEMMA_CONFIG)
    return {name: open_tokenizer(root / name) for name in KINDS}


def random_texts(count: int) -> list[str]:
    """Letters, spaces, control characters and any other code points, but for surrogates and sentencepiece's space; no NUL,
    which sentencepiece drops."""
    rng = random.Random(0)
    ranges = ((1, 32), (32, 127), (32, 127), (0xA0, 0x500), (0x4E00, 0x9000), (0x1F300, 0x1F700), (0xE000, 0x10FFFF))
    texts = [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(30))).replace("▁", "")
        for _ in range(count)
    ]
    return [*texts, *files.TEXT[:4], files.UNICODE, "", " ", "  two  spaces  ", "\n\n", " a", "a "]


# --- ids and back


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(made, kind):
    for text in random_texts(150):
        ids = made[kind].encode(text)
        assert made[kind].decode(ids) == text
        assert all(0 <= token < made[kind].vocab_size for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_no_special_ids(made, kind):
    """Whatever special tokens' texts are in it; and it still comes back."""
    tokenizer, rng = made[kind], random.Random(1)
    specials = sorted(tokenizer._vocabulary.special)
    assert len(specials) >= 3
    for special in specials:
        for text in (special, f"a{special}b", f" {special} {special}\n", special[:2] + special, special + special[1:]):
            ids = tokenizer.encode(text)
            assert not tokenizer.special_ids.intersection(ids), text
            assert tokenizer.decode(ids) == text
    mixed = ["".join(rng.choice([*specials, "<", ">", " ", "ab", "é"]) for _ in range(8)) for _ in range(50)]
    for text in mixed:
        assert not tokenizer.special_ids.intersection(tokenizer.encode(text)), text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_read_if_asked(made, kind):
    tokenizer = made[kind]
    for text, token in tokenizer._vocabulary.special.items():
        ids = tokenizer.encode(f"dog{text}fox", special=True)
        assert ids.count(token) == 1
        assert tokenizer.special_ids.intersection(ids) == {token}
        assert tokenizer.decode(ids).replace(" ", "") == "dogfox"  # some tokenizers begin each part with a space
        assert tokenizer.encode(text, special=True) == [token]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_added(made, kind):
    assert made[kind].encode("") == []
    assert made[kind].bos_id not in made[kind].encode("the dog")


@pytest.mark.parametrize("kind", KINDS)
def test_vocab_size_is_the_largest_id_and_one(made, kind):
    tokenizer = made[kind]
    size = tokenizer.vocab_size
    assert tokenizer._vocabulary.text_of(size - 1) is not None
    if kind in files.FAMILIES:
        raw = HFTokenizer.from_file(str(tokenizer.path))
        assert size == max(raw.get_vocab(with_added_tokens=True).values()) + 1 > raw.get_vocab_size(False) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_the_same(made, kind):
    """tokenizers' own copies forget that special tokens aren't to be read."""
    tokenizer = made[kind]
    text = "".join(tokenizer._vocabulary.special) + files.UNICODE
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other == tokenizer
        assert other.encode(text) == tokenizer.encode(text)


def test_against_transformers(made):
    """Ids of texts without and with special tokens, on the same files."""
    transformers = pytest.importorskip("transformers")
    for kind in files.FAMILIES:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(made[kind].path.parent)
        for text in [*random_texts(20), "dog ".join(made[kind]._vocabulary.special)]:
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert made[kind].encode(text, special=True) == expected
            assert made[kind].decode(expected) == theirs.decode(expected, skip_special_tokens=True)
            plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert made[kind].encode(text) == plain


def test_model_files_against_transformers(made):
    """transformers makes a tokenizer.json of a .model; where a text begins with a space it leaves one out."""
    transformers = pytest.importorskip("transformers")
    tokenizer = made["sentencepiece prefix"]
    theirs = transformers.LlamaTokenizer.from_pretrained(tokenizer.path.parent)
    for text in [*random_texts(50), "dog</s>", "<s>dog </s>the dog\n<s>", "<s>", "</s> <s>"]:
        if not text.startswith(" "):
            assert tokenizer.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"]


def test_sentencepiece_begins_texts_with_a_space_only_at_their_begin(made):
    """Llama 2's models: behind a special token there is none."""
    tokenizer = made["sentencepiece prefix"]
    for text, pieces in (("dog", "▁dog"), (" dog", "▁▁dog"), ("<s>dog</s> dog", "<s>dog</s>▁dog"), ("a</s>", "▁a</s>")):
        ids = tokenizer.encode(text, special=True)
        assert "".join(tokenizer._vocabulary.text_of(token) or "" for token in ids) == pieces


def test_unigram_models_find_special_text_as_a_piece(tmp_path):
    """Not by parsing but by their vocabulary, which has the special tokens too."""
    made = HFTokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        ["hello <s> and </s> s>"] * 5,
        trainers.UnigramTrainer(vocab_size=60, special_tokens=names, unk_token="<unk>", show_progress=False),
    )
    made.save(str(tmp_path / "tokenizer.json"))
    files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "unk_token": "<unk>"})
    made.encode_special_tokens = True
    assert made.token_to_id("</s>") in made.encode("and</s>", add_special_tokens=False).ids  # what is guarded against
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode("and</s> <s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids).replace(" ", "") == "and</s><s>"
    assert 0 in tokenizer.encode("漢")


def test_truncation_and_padding_of_the_file_are_not_done(tmp_path):
    files.llama3(tmp_path)
    raw = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=40)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = files.TEXT[0]
    assert open_tokenizer(tmp_path).decode(open_tokenizer(tmp_path).encode(text)) == text
    assert open_tokenizer(tmp_path).encode("") == []


# --- ids with a meaning


def test_ids_with_a_meaning(made):
    """Several stop ids, the tokenizer's own first; padding is the configured one, or else the first stop id."""
    ids = {kind: {text: i for text, i in made[kind]._vocabulary.special.items()} for kind in KINDS}
    stops = {
        "llama3": ("<|eot_id|>", "<|end_of_text|>"),
        "mistral": ("</s>",),
        "gemma": ("<eos>", "<end_of_turn>"),
        "phi3": ("<|endoftext|>", "<|end|>"),
        "qwen": ("<|im_end|>",),
        "sentencepiece prefix": ("</s>",),
        "sentencepiece symbols": ("</s>",),
    }
    pads = {"gemma": "<pad>", "phi3": "<|endoftext|>", "qwen": "<|endoftext|>"}
    bos = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "qwen": None}
    for kind, tokenizer in made.items():
        assert tokenizer.stop_ids == tuple(ids[kind][text] for text in stops[kind])
        assert tokenizer.pad_id == ids[kind][pads.get(kind, stops[kind][0])]
        text = bos.get(kind, "<s>")
        assert tokenizer.bos_id == (None if text is None else ids[kind][text])
        assert tokenizer.decode([*tokenizer.stop_ids, tokenizer.pad_id]) == ""
    # By the key, or else by what tokenizer.json does.
    adds = {kind: tokenizer.adds_bos for kind, tokenizer in made.items()}
    assert [kind for kind in KINDS if not adds[kind]] == ["phi3", "qwen", "sentencepiece symbols"]


def test_special_tokens_map_is_behind_tokenizer_config(tmp_path):
    files.llama3(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    token = open_tokenizer(tmp_path)._vocabulary.id_of
    files.write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|end_of_text|>"}})
    assert open_tokenizer(tmp_path).stop_ids == (token("<|eot_id|>"),)
    files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": None})
    assert open_tokenizer(tmp_path).stop_ids == (token("<|end_of_text|>"),)
    files.write_json(tmp_path / "special_tokens_map.json", {})
    files.write_json(tmp_path / "generation_config.json", {"eos_token_id": 7, "pad_token_id": 9})
    tokenizer = open_tokenizer(tmp_path)
    begin = token("<|begin_of_text|>")  # by the post-processor, which is the last to be asked
    assert (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.bos_id) == ((7,), 9, begin)
    assert 7 in tokenizer.special_ids
    assert 9 not in tokenizer.special_ids, "padding is a mask: an ordinary token's id may be there for it"
    files.write_json(tmp_path / "generation_config.json", {"eos_token_id": 7, "bos_token_id": 5})
    assert open_tokenizer(tmp_path).bos_id == 5
    files.write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<|begin_of_text|>"})
    assert open_tokenizer(tmp_path).bos_id == token("<|begin_of_text|>"), "a name goes before an id"
    assert 5 not in open_tokenizer(tmp_path).special_ids


def test_a_token_that_is_named_is_special(tmp_path):
    """Whatever tokenizer.json says of it."""
    ordinary = open_tokenizer(files.qwen(tmp_path))
    think = ordinary.encode("<think>")[0]
    assert ordinary.decode([think]) == "<think>"
    tokenizer = open_tokenizer(files.qwen(tmp_path, eos_token="<think>"))
    assert tokenizer.stop_ids[0] == think
    assert tokenizer.decode([think]) == ""
    assert think not in tokenizer.encode("a<think>b")
    assert tokenizer.encode("a<think>b", special=True).count(think) == 1


def test_a_directory_prefers_tokenizer_json(tmp_path):
    files.mistral(tmp_path)
    files.sentencepiece_model(tmp_path / "tokenizer.model", prefix=True)
    assert open_tokenizer(tmp_path).path.name == "tokenizer.json"
    assert open_tokenizer(tmp_path / "tokenizer.model").path.name == "tokenizer.model"
    (tmp_path / "tokenizer.json").unlink()
    assert open_tokenizer(tmp_path).path.name == "tokenizer.model"


def test_tokens_beside_a_model(tmp_path):
    """added_tokens.json and added_tokens_decoder give ids that the .model doesn't have."""
    path = files.sentencepiece_model(tmp_path / "tokenizer.model", prefix=True)
    bare = Tokenizer(path)
    size = bare.vocab_size
    assert (bare.stop_ids, bare.pad_id, bare.bos_id, bare.adds_bos) == ((2,), 2, 1, False)
    decoder = {str(size): {"content": "<|end|>", "special": True}, "1": {"content": "<s>", "special": True}}
    files.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder, "eos_token": "<|end|>"})
    files.write_json(tmp_path / "added_tokens.json", {"<think>": size + 1, "<think>ing": size + 2})
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (size + 3, (size,))
    ids = tokenizer.encode("the <think>dog<|end|>")
    assert size + 1 in ids
    assert size not in ids
    assert tokenizer.decode(ids) == "the <think>dog<|end|>"
    assert tokenizer.encode("a<think>ing")[-1] == size + 2, "the longest counts"
    parsed = tokenizer.encode("the <think> dog<|end|>", special=True)
    assert parsed[-1] == size
    assert tokenizer.decode(parsed) == "the <think> dog"


# --- files that can't be used


def change(name: str, **changes: object):
    def write(directory):
        files.write_json(directory / name, json.loads((directory / name).read_text()) | changes)

    return write


def rewrite(name: str, text: str):
    return lambda directory: (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), r"no tokenizer\.json or tokenizer\.model in this directory"),
        (rewrite("tokenizer.json", '{"version": "1.0"'), r"tokenizer\.json can't be read \(.*\), wanted a tokenizer"),
        (rewrite("tokenizer_config.json", "{"), r"tokenizer_config\.json can't be read"),
        (rewrite("tokenizer_config.json", "[]"), r"tokenizer_config\.json: a JSON list, wanted an object"),
        (change("tokenizer_config.json", eos_token="<nope>"), r"eos_token '<nope>' isn't in it"),
        (change("tokenizer_config.json", pad_token="<nope>"), r"pad_token '<nope>' isn't in it"),
        (change("tokenizer_config.json", bos_token="<nope>"), r"bos_token '<nope>' isn't in it"),
        (change("tokenizer_config.json", eos_token=5), r"eos_token=5, wanted the token's text"),
        (change("tokenizer_config.json", eos_token={"text": "a"}), r"eos_token=.*, wanted the token's text"),
        (change("tokenizer_config.json", add_bos_token="yes"), r"add_bos_token='yes', wanted true or false"),
        (change("tokenizer_config.json", additional_special_tokens="a"), r"additional_special_tokens='a', wanted a li"),
        (change("tokenizer_config.json", added_tokens_decoder={"3": {"content": "<x>"}}), r"token 3 is .*says '<x>'"),
        (change("tokenizer_config.json", added_tokens_decoder={"a": {}}), r"added_tokens_decoder isn't what"),
        (change("generation_config.json", eos_token_id=[3, 99999]), r"eos_token_id 99999 is no token of it"),
        (change("generation_config.json", pad_token_id=99999), r"pad_token_id 99999 is no token of it"),
        (change("generation_config.json", eos_token_id="</s>"), r"eos_token_id='</s>', wanted an id or a list"),
        (change("generation_config.json", eos_token_id=[True]), r"eos_token_id=\[True\], wanted an id or a list"),
        (rewrite("added_tokens.json", '{"<x>": "1"}'), r"added_tokens\.json: '<x>' is '1', wanted its id"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, damage, message):
    damage(files.llama3(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_stop_id(tmp_path):
    files.llama3(tmp_path, eos_token=None)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(
        UserError, match=r"no id ends a text, wanted eos_token in tokenizer_config\.json or eos_token_id"
    ):
        open_tokenizer(tmp_path)


def test_paths_that_are_no_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for name, message in (
        ("none", "no such file or directory"),
        ("vocab.txt", r"unknown ending '\.txt', wanted \.json or \.model"),
        ("bad.model", r"can't be read, wanted a sentencepiece \.model"),
        ("", "in this directory"),
    ):
        with pytest.raises(UserError, match=message):
            open_tokenizer(tmp_path / name)


def test_a_model_file_knows_no_strips(tmp_path):
    size = Tokenizer(files.sentencepiece_model(tmp_path / "tokenizer.model", prefix=True)).vocab_size
    decoder = {str(size): {"content": "<|end|>", "special": True, "rstrip": True}}
    files.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(UserError, match=r"'<\|end\|>' strips spaces, wanted tokenizer\.json"):
        open_tokenizer(tmp_path)


# --- where texts meet


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_context(made, kind):
    before = "Which is better?\nThe better summary="
    first, second = joining.answer_ids(made[kind], before)
    for answer, token in (("1", first), ("2", second)):
        assert made[kind].encode(before + answer) == [*made[kind].encode(before), token]
    assert first != second
    # Alone it is another token for those that begin texts with a space.
    begins = made[kind].encode("1") != [first]
    assert begins == (kind in ("mistral", "phi3", "sentencepiece prefix"))


def test_answers_behind_special_tokens(made):
    before = "<|start_header_id|>assistant<|end_header_id|>"
    tokenizer = made["llama3"]
    found = joining.answer_ids(tokenizer, before, special=True)
    assert found == (tokenizer.single("1"), tokenizer.single("2"))


@pytest.mark.parametrize(
    ("before", "answers", "message"),
    [
        (
            "The better=",
            ("1", "漢"),
            r"answer '漢' behind 'The better=' ends in tokens \[.*\] with 0 of the text's own",
        ),
        ("The better=", ("", "2"), r"answer '' behind 'The better=' ends in tokens \[\] with 0"),
        ("The better=", ("1", "1"), r"answers '1' and '1' behind 'The better=' are both token \d+, wanted two"),
        ("the quick b", ("r", "1"), r"answer 'r' behind 'the quick b' ends in .* with [1-9] of the text's own"),
    ],
)
def test_answers_that_are_no_single_tokens(made, before, answers, message):
    with pytest.raises(UserError, match=message):
        joining.answer_ids(made["llama3"], before, answers)


class RightAligned(fakes.ByteTokenizer):
    """Letters in threes counted from the end: one more changes all of them."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        whole = [text[max(end - 3, 0) : end] for end in range(len(text), 0, -3)][::-1]
        return [int.from_bytes(piece.encode()) for piece in whole]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(i.to_bytes(3).lstrip(b"\0").decode() for i in ids)


def test_answers_that_change_the_text_before_them():
    """One token more is not enough."""
    tokenizer = RightAligned()
    assert len(tokenizer.encode("abc1")) == len(tokenizer.encode("abc")) + 1
    with pytest.raises(UserError, match=r"ends in tokens \['a', 'bc1'\] with 1 of the text's own changed"):
        joining.answer_ids(tokenizer, "abc")


@pytest.mark.parametrize("kind", KINDS)
def test_continuations(made, kind):
    """As in the middle of a text: no space of the tokenizer's own, and all of the text's."""
    tokenizer = made[kind]
    for text in ("dog", " dog", "\n\ndog", "", "漢"):
        ids = joining.continuation_ids(tokenizer, text)
        before = tokenizer.encode("x:")
        assert tokenizer.decode([*before, *ids]) == "x:" + text


def test_joining_report(made):
    """Pieces that merge across the border are counted, and the first of them is shown."""
    tokenizer = made["llama3"]
    prompts, responses = ["The quick bro", "the dog.", "a "], ["wn fox", " The dog", "brown"]
    whole = [tokenizer.encode(p + r) for p, r in zip(prompts, responses, strict=True)]
    pieces = [tokenizer.encode(p) + tokenizer.encode(r) for p, r in zip(prompts, responses, strict=True)]
    differing = sum(a != b for a, b in zip(whole, pieces, strict=True))
    assert differing == 2
    report = joining.joining_report(tokenizer, prompts, responses)
    assert (report.count, report.differing, report.share) == (3, 2, 2 / 3)
    assert report.example.startswith("'The quick bro' + 'wn fox' is [")
    assert "in 2 of 3 (66.7%): 'The" in str(report)
    clean = joining.joining_report(tokenizer, prompts[1:2], responses[1:2])
    assert (clean.count, clean.differing, clean.example) == (1, 0, "")
    assert joining.joining_report(tokenizer, [], []).share == 0.0


def test_joining_with_a_tokenizer_that_begins_texts_with_a_space(made):
    """Encoded as a text of its own, every response has one more; as a continuation none has."""
    tokenizer = made["mistral"]
    prompts, responses = ["The dog:", "So,\n"], ["it is", "漢"]
    assert joining.joining_report(tokenizer, prompts, responses).differing == 0
    for prompt, response in zip(prompts, responses, strict=True):
        assert tokenizer.encode(prompt) + tokenizer.encode(response) != tokenizer.encode(prompt + response)


def test_joining_behind_special_tokens(made):
    """Nothing merges with one; but some tokenizers begin the text anew behind it, with a space."""
    prompts, responses = ["fox<|eot_id|>", "fox<|end_of_text|>\n"], [" brown", "dog"]
    assert joining.joining_report(made["llama3"], prompts, responses, special=True).differing == 0
    assert joining.joining_report(made["phi3"], ["a<|end|>"], ["b"], special=True).differing == 1


# --- files that make the library panic


def changed(directory: pathlib.Path, **changes: object) -> pathlib.Path:
    """A Llama tokenizer, parts of whose tokenizer.json are others."""
    path = files.llama3(directory) / "tokenizer.json"
    files.write_json(path, json.loads(path.read_text()) | changes)
    return path


PANICS = {
    "when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "when it encodes": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}},
    "when it cuts": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "when it adds": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("when", PANICS)
def test_panics_are_one_line_with_the_path(tmp_path, capfd, when):
    """And what Rust writes of it stays away from the terminal."""
    path = changed(tmp_path, **PANICS[when])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_panics_at_some_texts(tmp_path):
    """Of an expression that gives up where it would have to try too much."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path = changed(tmp_path, pre_tokenizer=split)
    tokenizer = open_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} can't encode a text .*retry-limit"):
        tokenizer.encode("a" * 60 + "b")
    with pytest.raises(UserError, match=f"{re.escape(str(path))} can't decode its ids"):
        tokenizer.decode([-1])
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"


def test_an_interrupt_is_none_of_a_tokenizers_failures(tmp_path, monkeypatch):
    tokenizer = open_tokenizer(files.llama3(tmp_path))

    def interrupted(*_: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer._vocabulary), "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")
