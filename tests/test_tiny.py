"""The embedded world: its posts, what the gold judge says of summaries, its tokenizer, raters and training data."""

import dataclasses
import itertools
import unicodedata

import numpy as np
import pytest

from oaif_jax.annotate.orders import Template
from oaif_jax.annotate.questions import Questions, fitted
from oaif_jax.base.errors import UserError
from oaif_jax.data.dataset import DataSet, context_of
from oaif_jax.data.jsonl import TextPair, write_pairs
from oaif_jax.data.records import Message
from oaif_jax.tiny import degenerate, gold, templates, tokenizer_recipe, world, writers, written
from oaif_jax.tiny.data import (
    FURTHER,
    MARKS,
    Limits,
    Shares,
    asset,
    dataset,
    dense_targets,
    instruction,
    judged_batch,
    longest_post,
    mark_of,
    plain_voice,
    policy_voice,
    post_of,
)

POST = "hello everyone. we talked about the river. my friend loves the dog. i am so tired. i worry about the exam."
TOPICS = ("river", "dog", "exam")
PROMPT_TOKENS, RESPONSE_TOKENS = 56, 16  # as the experiments have them
MANY = 3000


LIMITS = Limits(0, PROMPT_TOKENS, RESPONSE_TOKENS)


def data_for(reads: str = "prompts", **changes) -> DataSet:
    limits = {"seed": 0, "train_posts": 20_000, "prompt_tokens": PROMPT_TOKENS, "response_tokens": RESPONSE_TOKENS}
    return dataset(reads, **(limits | changes))


@pytest.fixture(scope="module")
def data() -> DataSet:
    return data_for()


@pytest.fixture(scope="module")
def tokenizer():
    return policy_voice().tokenizer


def ids(text: str, *, stop: bool = False) -> list[int]:
    return policy_voice().answer(text, stop=stop)


def posts(split: str, count: int, seed: int = 0) -> list[world.Post]:
    return [world.post(seed, split, index) for index in range(count)]


# --- posts


def test_posts_are_pure_functions():
    """Of (seed, split, index), in whatever order they are asked for."""
    forwards = [world.post(3, "train", index) for index in range(20)]
    backwards = [world.post(3, "train", index) for index in reversed(range(20))][::-1]
    assert forwards == backwards
    assert len({post.text for post in forwards}) == 20


def test_splits_and_seeds_differ():
    """No post of one split, or of another seed, is a post of another."""
    found = [{post.text for post in posts(split, 1000)} for split in world.SPLITS]
    found.append({post.text for post in posts("test", 1000, seed=1)})
    for one, other in itertools.combinations(found, 2):
        assert not one & other


def test_purposes_differ():
    draws = [world.generator(0, "train", 5, purpose).random() for purpose in range(4)]
    assert len(set(draws)) == 4


def test_posts_are_as_described():
    """Three to five topics, each in a fact of its own and in the post's order; one to three sentences of small talk."""
    numbers = {(3, 1): 0}
    for post in posts("train", 500):
        sentences = [f"{sentence}." for sentence in post.text.rstrip(".").split(". ")]
        assert " ".join(sentences) == post.text
        talk = [sentence for sentence in sentences if sentence in world.SMALL_TALK]
        facts = [sentence for sentence in sentences if sentence not in world.SMALL_TALK]
        assert len(set(talk)) == len(talk)
        assert len(facts) == len(set(post.topics)) == len(post.topics)
        for fact, topic in zip(facts, post.topics, strict=True):
            assert fact in [form.format(topic) for form in world.FACTS]
        assert world.topics_of(post.text) == post.topics
        numbers[len(facts), len(talk)] = numbers.get((len(facts), len(talk)), 0) + 1
    assert set(numbers) == set(itertools.product((3, 4, 5), (1, 2, 3)))


def test_no_word_is_two_things():
    """A topic is named by its fact only: small talk, facts, chatter and instructions hold none."""
    texts = [*world.FACTS, *world.SMALL_TALK, *world.CHATTER, *map(templates.instruction, templates.INSTRUCTIONS)]
    assert not set(world.TOPICS) & {word for text in texts for word in world.words(text)}
    assert len(set(world.TOPICS)) == len(world.TOPICS)


@pytest.mark.parametrize("split", world.SPLITS)
def test_everything_fits_the_limits(data, split):
    """Prompts and references of all writers; an error would name what doesn't fit."""
    indices = range(MANY // 3)
    drawn = data.examples(split, indices)
    prompts = data.prompts(drawn)
    assert prompts.valid.sum(-1).max() <= data.tokens_of(longest_post())[0] <= PROMPT_TOKENS
    for writer in writers.STYLES:
        references = data_for("references", writer=writer)
        written = references.examples(split, indices)
        made = references.batch(written, "references").data
        assert made.mask.sum(-1).max() <= RESPONSE_TOKENS
        assert max(len(world.words(example.reference)) for example in written) <= world.MAX_WORDS
    for name in templates.INSTRUCTIONS:
        asked = fitted(Questions(plain_voice(), instruction(name), 0), data, (split,))
        assert asked.arrays(drawn)["question_valid"].any(-1).all()
        assert asked.width == LIMITS.question_tokens(templates.instruction(name))


def test_longest_prompt(data, tokenizer):
    """Made of the longest sentences, it is longer than any post, and a post that long can be."""
    lengths = [len(tokenizer.encode(templates.prompt(post.text))) for post in posts("train", MANY)]
    longest = data.tokens_of(longest_post())[0]
    assert longest - 4 <= max(lengths) <= longest


def test_a_prompt_that_is_too_long(data):
    short = dataclasses.replace(data, prompt_tokens=20)
    with pytest.raises(UserError, match=r"prompt 0 has \d+ tokens, wanted 1 to 20"):
        short.prompts(data.examples("train", [0]))


# --- the gold judge


@pytest.mark.parametrize(
    ("summary", "score"),
    [
        ("river, dog, exam", 3.0),
        ("", 0.0),
        ("dog", 1.0),
        ("dog, dog", 0.0),
        ("dog, dog, dog", -1.0),
        ("dog, boat", 0.0),
        ("boat", -1.0),
        ("boat, boat", -2.0),
        ("hello", -0.25),
        ("river, dog, exam, hello", 2.75),
        ("river dog. exam", 3.0 - 0.5),
        ("dogs, xyz", -0.5),
        ("river,, dog", 1.75),
        ("river,,,, dog, dog", 2.0 - 0.75 - 1.0),
        (",river", 0.75),
        ("river,", 0.75),
        ("river.", 0.75),
        (",,,", -0.75),
        (".", -0.25),
        ("river dog", 1.75),
        ("river,dog", 1.75),
        ("river,  dog", 1.75),
        ("river\n, dog", 1.75),
        ("river, do", 0.75),
        ("river, TL;DR: dog", 1.5),
        ("river, dog\x15", 0.75),
        ("river, boat, river, nice, exam", -0.25 + 1 - 1 - 1 + 1),
    ],
)
def test_score_by_hand(summary, score):
    assert gold.score(POST, summary) == score


def random_summaries(count: int = 300):
    """Posts and word lists of every quality."""
    rng = np.random.default_rng(0)
    for index in range(count):
        post = world.post(0, "train", index)
        yield rng, post, writers.write(rng, post.topics, writers.random_style(rng))


def test_the_best_summary_names_each_topic_once():
    for _, post, named in random_summaries():
        best = gold.score(post.text, world.join(post.topics))
        assert best == len(post.topics)
        assert gold.score(post.text, world.join(named)) <= best
        if gold.score(post.text, world.join(named)) == best:
            assert sorted(named) == sorted(post.topics)


def test_what_one_more_word_does():
    """A topic not yet named +1, a repeat or an invention -1, another word -1/4, wherever it stands."""
    for rng, post, named in random_summaries():
        before = gold.score(post.text, world.join(named))

        def with_word(word, named=named, post=post, rng=rng):
            place = rng.integers(len(named) + 1)
            return gold.score(post.text, world.join([*named[:place], word, *named[place:]]))

        for topic in post.topics:
            assert with_word(topic) - before == (-1.0 if topic in named else 1.0)
        assert with_word(writers.invention(rng, post.topics)) - before == -1.0
        assert with_word(world.CHATTER[rng.integers(len(world.CHATTER))]) - before == -0.25


def test_order_does_not_matter():
    for rng, post, named in random_summaries():
        expected = gold.score(post.text, world.join(named))
        assert gold.score(post.text, world.join(list(rng.permutation(named)))) == expected
        shuffled = ". ".join(rng.permutation(post.text.split(". ")))
        assert gold.score(shuffled, world.join(named)) == expected


def test_each_stray_sign_costs():
    """Words joined by ", " have none. One comma or full stop more costs a quarter wherever it stands, and so does each space
    without its comma; the text of the best score is the list of topics and no other."""
    for rng, post, named in random_summaries():
        text = world.join(named)
        assert gold.strays(text) == 0
        before = gold.score(post.text, text)
        ends = [i for i in range(len(text) + 1) if i == len(text) or text[i] == ","] or [0]
        for sign in ",.":
            place = ends[rng.integers(len(ends))]
            assert gold.score(post.text, text[:place] + sign + text[place:]) == before - 0.25
            assert gold.score(post.text, sign + text) == before - 0.25
        assert gold.score(post.text, " ".join(named)) == before - 0.25 * max(len(named) - 1, 0)


def test_references_have_no_strays():
    """What policies are fine-tuned on is scored as by its words alone."""
    for index in range(500):
        for writer in writers.STYLES:
            assert gold.strays(writers.reference(0, "train", index, writer)) == 0


@pytest.mark.parametrize(
    ("text", "judged"),
    [("river,", "river"), ("river,,", "river,"), ("river, dog", "river, dog"), (",", ","), (",,", ",,"), ("", "")],
)
def test_a_comma_that_a_word_may_follow(text, judged):
    assert gold.so_far(text) == judged


@pytest.mark.parametrize(("instruction", "best"), [("helpful", 5), ("short", 3), ("very_short", 2)])
def test_how_many_topics_pay(instruction, best):
    """Naming a third topic just pays under `short`, a second under `very_short`, and all under `helpful`."""
    post = next(post for post in posts("train", 50) if len(post.topics) == 5)
    useful = [gold.utility(post.text, world.join(post.topics[:count]), instruction) for count in range(6)]
    assert int(np.argmax(useful)) == best
    assert useful[0] == 0.0


def test_utility_by_hand():
    """Two words cost c (1 + 2), three c (1 + 2 + 3): c is 0.3 for short, 0.4 for very short."""
    for name, summary, expected in (
        ("helpful", "river, dog", 2.0),
        ("short", "river, dog", 2.0 - 0.9),
        ("very_short", "river, dog", 2.0 - 1.2),
        ("short", "river, dog, hello", 1.75 - 1.8),
        ("very_short", "", 0.0),
    ):
        assert gold.utility(POST, summary, name) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("river", "dog", True),  # the post's earlier topic
        ("exam, dog", "river", False),
        ("river, dog", "river, exam", True),
        ("river, dog, hello, hello, hello, hello", "river", True),  # further topics come before length
        ("river, hello", "river", False),  # the shorter
        ("dog, river", "river, dog", False),  # the post's order
        ("river, dog", "river, dog", None),
        ("hello", "nice", None),
    ],
)
def test_taste(first, second, expected):
    assert gold.first_in_tie(POST, first, second) is expected
    assert gold.first_in_tie(POST, second, first) is (None if expected is None else not expected)


def test_taste_is_an_order():
    """No circles: among three, whoever beats the one that beats a third beats the third."""
    rng = np.random.default_rng(1)
    for _, post, _ in random_summaries(100):
        texts = [world.join(writers.write(rng, post.topics, writers.random_style(rng))) for _ in range(3)]
        for a, b, c in itertools.permutations(texts):
            if gold.first_in_tie(post.text, a, b) and gold.first_in_tie(post.text, b, c):
                assert gold.first_in_tie(post.text, a, c)


# --- raters


def test_a_rater_without_noise_is_the_judge():
    exact = gold.Rater("exact", noise=0.0, length_bias=0.0)
    for rng, post, named in random_summaries(100):
        assert exact.opinion(rng, post.text, world.join(named)) == gold.score(post.text, world.join(named))
        assert exact.quality(rng, post.text, world.join(post.topics)) == 5
        assert exact.quality(rng, post.text, "") == 1
    assert exact.quality(np.random.default_rng(0), POST, "boat, boat") == 1
    assert exact.quality(np.random.default_rng(0), "the river. the dog.", "river") == 3


def test_noise_and_bias():
    """Opinions scatter about the score plus the bias for length, as far as the rater's noise says."""
    rng = np.random.default_rng(0)
    for rater in gold.RATERS:
        opinions = [rater.opinion(rng, POST, "river, dog, hello") for _ in range(2000)]
        # Six standard errors.
        assert abs(np.mean(opinions) - (1.75 + 3 * rater.length_bias)) < 6 * rater.noise / 2000**0.5
        assert abs(np.std(opinions) / rater.noise - 1) < 0.1


def test_raters_without_noise_agree_with_gold(monkeypatch):
    monkeypatch.setattr(gold, "RATERS", tuple(gold.Rater(str(i), 0.0, 0.0) for i in range(3)))
    decided = 0
    for rng, post, named in random_summaries(200):
        other = world.join(writers.write(rng, post.topics, writers.random_style(rng)))
        difference = gold.score(post.text, world.join(named)) - gold.score(post.text, other)
        if difference:
            decided += 1
            assert gold.pick(rng, post.text, world.join(named), other) == (difference > 0, 3 if difference > 0 else 0)
    assert decided > 100


def test_pick_is_the_majority(monkeypatch):
    """Two who love length outvote one who doesn't."""
    fair, biased = gold.Rater("fair", 0.0, 0.0), gold.Rater("biased", 0.0, 10.0)
    rng = np.random.default_rng(0)
    for raters, expected in (((fair, biased, biased), (False, 1)), ((fair, fair, biased), (True, 2))):
        monkeypatch.setattr(gold, "RATERS", raters)
        assert gold.pick(rng, POST, "river", "river, boat, boat") == expected


def test_raters_agree_with_gold_the_more_the_clearer():
    rng = np.random.default_rng(0)

    def agreed(better: str, worse: str) -> float:
        return np.mean([gold.pick(rng, POST, better, worse)[0] for _ in range(400)])

    slight, clear, plain = (
        agreed("river, dog, exam", worse) for worse in ("river, dog, exam, hello", "river, dog, boat", "boat, boat")
    )
    assert 0.4 < slight < clear < plain
    assert clear > 0.8
    assert plain > 0.97


# --- the tokenizer


def test_world_round_trip(data):
    """Everything that is written in this world comes back as it was, and no piece of it is unknown."""
    texts = [templates.prompt(post.text) for post in posts("train", 200)]
    texts += [f"{templates.CUE} {text}" for text in (writers.reference(0, "train", i) for i in range(200))]
    for name in templates.INSTRUCTIONS:
        question = templates.annotation(POST, templates.instruction(name))
        texts += [question, f"{question}{templates.FIRST} river{templates.SECOND} dog{templates.CLOSING}1"]
    for text in texts:
        ids = data.voice.tokenizer.encode(text)
        assert data.voice.tokenizer.decode(ids) == text
        assert max(ids) < data.voice.tokenizer.vocab_size
        assert not set(ids) & {data.voice.tokenizer.pad_id, *data.voice.tokenizer.stop_ids}


def random_text(rng: np.random.Generator) -> str:
    """Letters, spaces, punctuation, line ends, and any other character but the one that stands for a space."""
    common = "  \n\t.,:;!?abcxyzABC0129<>_-'\"\\"
    drawn = []
    for _ in range(int(rng.integers(1, 30))):
        if rng.random() < 0.7:
            drawn.append(common[rng.integers(len(common))])
        elif unicodedata.category(letter := chr(int(rng.integers(1, 0x110000)))) != "Cs":
            drawn.append(letter)
    return "".join(drawn).replace("\u2581", "")


def test_arbitrary_text_round_trip(data):
    """Exact: no normalisation, no space added or lost, and bytes where there is no piece."""
    rng = np.random.default_rng(0)
    texts = [random_text(rng) for _ in range(500)]
    texts += [
        "",
        " ",
        "  two  spaces  ",
        "a b",
        " unknownword",
        "</s><pad><unk><s>",
        "<0x41>",
        "\x00",
        "e\u0301 \u00e9",
    ]
    for text in texts:
        ids = data.voice.tokenizer.encode(text)
        assert data.voice.tokenizer.decode(ids) == text
        assert not set(ids) & {data.voice.tokenizer.pad_id, *data.voice.tokenizer.stop_ids}, (
            "text made an id that has a meaning"
        )


def test_one_word_is_one_token(data):
    """Summaries' words with the space before them, commas, answers, marks: a token each."""
    for word in (*world.TOPICS, *world.CHATTER, "yes", "no"):
        assert data.voice.tokenizer.decode([data.voice.tokenizer.single(f" {word}")]) == f" {word}"
    for piece in (",", *templates.ANSWERS, *MARKS, *templates.MARKS, "\n"):
        assert data.voice.tokenizer.decode([data.voice.tokenizer.single(piece)]) == piece
    named = ["river", "hello", "dog"]
    assert len(ids(world.join(named))) == 2 * len(named) - 1
    assert ids("", stop=True) == [data.voice.tokenizer.stop_ids[0]]


def test_pieces_join_in_context(data):
    """Parts that are joined as ids are what the whole text would be: policy's row, annotator's row, its answers."""
    encode = data.voice.tokenizer.encode
    prompt = templates.prompt(POST)
    assert [*encode(prompt), *ids("river, dog")] == encode(f"{prompt} river, dog")
    (post,) = [dataclasses.replace(data.examples("train", [0])[0], prompt=(Message("user", POST),))]
    assert policy_voice().prompt(post) == encode(prompt)
    assert context_of(post) == post_of(post) == POST
    template = Questions(plain_voice(), instruction("helpful"), 0).template
    assert template == Template(**data.judged.around)
    question, first, second = templates.annotation(POST, "what?"), "river, dog", "boat"
    row = [*encode(question), *template.first, *ids(first), *template.second]
    row += [*ids(second), *template.closing]
    text = f"{question}{templates.FIRST} {first}{templates.SECOND} {second}{templates.CLOSING}"
    assert row == encode(text)
    for answer, token in zip(templates.ANSWERS, template.answers, strict=True):
        assert [*row, token] == encode(text + answer)


def test_tokenizer_is_what_its_recipe_makes(tmp_path, data):
    tokenizer_recipe.train(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == data.voice.tokenizer.path.read_bytes()


# --- arrays


def test_prompts_and_responses_come_back_as_text(data):
    drawn = data.examples("validation", range(20))
    prompts = data.prompts(drawn)
    summaries = [("river, dog", ""), ("hello", "boat, boat")] * 10
    made = data.rollout(prompts, summaries)
    for i, post in enumerate(posts("validation", 20)):
        kept = prompts.tokens[i][prompts.valid[i]]
        assert data.voice.tokenizer.decode(kept) == templates.prompt(post.text)
        for c in range(2):
            assert data.voice.text(made.tokens[i, c], made.mask[i, c]) == summaries[i][c]
            assert made.tokens[i, c][made.mask[i, c]][-1] == data.voice.tokenizer.stop_ids[0]


def test_pairs_have_the_chosen_first(tmp_path):
    write_pairs(tmp_path / "own.jsonl", [TextPair(POST, "river, dog", "boat"), TextPair(POST, "", "exam")])
    data = data_for("pairs", pairs=str(tmp_path / "own.jsonl"))
    batch = data.batch(data.examples("train", [0, 1]), "pairs")
    np.testing.assert_array_equal(batch.scores.value, [[1, 0], [1, 0]])
    assert batch.scores.known.all()
    assert batch.data.by == ("data", "data")
    texts = [
        [data.voice.text(t, m) for t, m in zip(*row, strict=True)]
        for row in zip(batch.data.tokens, batch.data.mask, strict=True)
    ]
    assert texts == [["river, dog", "boat"], ["", "exam"]]


def test_references_stand_behind_their_posts():
    data = data_for("references")
    batch = data.batch(data.examples("train", [7, 3]), "references")
    for i, index in enumerate((7, 3)):
        text = data.voice.text(batch.data.tokens[i, 0], batch.data.mask[i, 0])
        assert text == writers.reference(0, "train", index)
        prompt = data.voice.tokenizer.decode(batch.prompts.tokens[i][batch.prompts.valid[i]])
        assert prompt == templates.prompt(world.post(0, "train", index).text)


def test_marks():
    """Half a topic apart, from a to z; 0 is o."""
    assert MARKS[int(mark_of(np.array(0.0)))] == "o"
    np.testing.assert_array_equal(mark_of(np.array([-100.0, -1.0, 0.5, 5.0, 100.0])), [0, 12, 15, 24, 25])


def test_choices_break_ties_by_taste(data):
    batch = judged_batch("train", 0, 1, 60, LIMITS)
    chosen = set()
    for i, (label, choice) in enumerate(zip(batch["label"], batch["choice"], strict=True)):
        if label != 0.5:
            assert choice == label
            continue
        post = data.voice.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]]).split(templates.POST)[1]
        texts = [data.voice.text(batch["responses"][i, j], batch["mask"][i, j]) for j in range(2)]
        assert choice == {True: 1.0, False: 0.0, None: 0.5}[gold.first_in_tie(post, *texts)]
        chosen.add(float(choice))
    assert chosen == {0.0, 0.5, 1.0}


def recompute(data: DataSet, batch: dict, i: int, j: int, instruction: str) -> tuple[list[int], list[int], float]:
    """A list's word targets and marks, word by word, and its utility, all from the texts in the batch."""
    question = data.voice.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]])
    start, end = templates.annotation("", templates.instruction(instruction)), ""
    assert question.startswith(start)
    post = question.removeprefix(start) + end
    words = world.words(data.voice.text(batch["responses"][i, j], batch["mask"][i, j]))
    expected_words, expected_marks = [-1] * RESPONSE_TOKENS, [-1] * RESPONSE_TOKENS
    for k in range(len(words)):
        before, after = (gold.score(post, world.join(words[:n])) for n in (k, k + 1))
        expected_words[2 * k] = int(after - before == 1.0)
        if k + 1 < len(words):
            useful = gold.utility(post, world.join(words[: k + 1]), instruction)
            expected_marks[2 * k + 1] = int(np.clip(round(2 * useful) + 14, 0, 25))
    return expected_words, expected_marks, gold.utility(post, world.join(words), instruction)


@pytest.mark.parametrize("lists", [0.0, 1.0])
def test_annotator_batch_targets(data, lists):
    batch = judged_batch("train", 0, 1, 60, LIMITS, shares=Shares(lists=lists))
    comma = data.voice.tokenizer.single(",")
    for i in range(60):
        instruction = templates.INSTRUCTIONS[i % 3]
        useful = []
        for j in range(2):
            words, marks, utility = recompute(data, batch, i, j, instruction)
            assert batch["words"][i, j].tolist() == words
            assert batch["marks"][i, j].tolist() == marks
            assert batch["mark"][i, j] == np.clip(round(2 * utility) + 14, 0, 25)
            # Marks stand at commas, word targets at words, and neither where there is no token.
            tokens, mask = batch["responses"][i, j], batch["mask"][i, j]
            assert (tokens[batch["marks"][i, j] >= 0] == comma).all()
            assert (tokens[batch["words"][i, j] >= 0] != comma).all()
            assert (batch["words"][i, j][~mask] == -1).all()
            useful.append(utility)
        difference = useful[0] - useful[1]
        assert batch["label"][i] == (0.5 if abs(difference) < 1e-6 else float(difference > 0))
    assert {0.0, 1.0} <= set(batch["label"].tolist()) <= {0.0, 0.5, 1.0}


def test_dense_targets_of_degenerate_text(tokenizer):
    """`doctor,,,, beach, beach`: the first comma belongs to the list, the next three don't, and neither does the repeat."""
    post = "we talked about the doctor. i worry about the beach."
    cases = {
        " doctor,,,, beach, beach": ([1, -1, 0, 0, 0, 1, -1, 0], [-1, 16, 16, 15, 14, -1, 16, -1]),
        ",": ([0], [14]),
        " beach doctor.": ([1, 1, 0], [-1, -1, 17]),
        " boat\n2:": ([0, 0], [-1, 11]),
        "": ([], []),
    }
    for text, (words, marks) in cases.items():
        found = dense_targets(post, tokenizer.encode(text), "helpful")
        assert found == (words, marks), text


@pytest.mark.parametrize("kind", degenerate.KINDS)
def test_degenerate_candidates(data, kind):
    """They fit, hold no token that no policy draws, are judged by their texts, and gold prefers the other one far more often."""
    batch = judged_batch(
        "train", 0, 1, 60, LIMITS, shares=Shares(degenerate=1.0), kinds=(kind,), instructions=("short",)
    )
    ids = [batch["responses"][i, j][batch["mask"][i, j]] for i in range(60) for j in range(2)]
    assert max(map(len, ids)) <= RESPONSE_TOKENS
    assert not {int(token) for row in ids for token in row} & data.voice.tokenizer.special_ids
    start = templates.annotation("", templates.instruction("short"))
    degenerate_rows = 0
    for i in range(60):
        post = data.voice.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]]).removeprefix(start)
        useful = []
        for j in range(2):
            text = data.voice.text(batch["responses"][i, j], batch["mask"][i, j])
            useful.append(gold.utility(post, text, "short"))
            is_list = gold.strays(text) == 0 and {*world.words(text)} <= {*world.TOPICS, *world.CHATTER}
            degenerate_rows += not is_list or not text or kind == "repeats"
        assert batch["label"][i] == pytest.approx(0.5 + 0.5 * np.sign(round(useful[0] - useful[1], 6)))
    assert degenerate_rows >= 40


def test_candidates_that_policies_wrote(tmp_path, tokenizer):
    """A file of responses: pairs are of its posts, and of its responses as they are, or beside others."""
    rows = {
        5: [tokenizer.encode(" doctor,,,, beach"), tokenizer.encode(" beach.")],
        900: [[], tokenizer.encode(" boat,")],
    }
    written.write(tmp_path / "own.jsonl.gz", {index: [*row, row[0]] for index, row in rows.items()})
    again = (tmp_path / "own.jsonl.gz").read_bytes()
    written.write(tmp_path / "own.jsonl.gz", rows)
    assert (tmp_path / "own.jsonl.gz").read_bytes() == again, "the same responses, each once, in the same bytes"
    answered = written.read(tmp_path / "own.jsonl.gz", tokenizer.vocab_size)
    assert [row.post for row in answered] == [world.post(0, "train", index) for index in rows]
    batch = judged_batch("train", 0, 1, 60, LIMITS, shares=Shares(written=1.0), answered=answered)
    posts = {world.post(0, "train", index).text for index in rows}
    known = {tuple(ids) for row in rows.values() for ids in row}
    seen = 0
    for i in range(60):
        assert tokenizer.decode(batch["questions"][i][batch["question_valid"][i]]).split("POST: ")[1] in posts
        pair = [tuple(batch["responses"][i, j][batch["mask"][i, j]].tolist()) for j in range(2)]
        seen += sum(ids in known for ids in pair)
    assert 60 <= seen <= 119
    data = data_for("judged", candidates=str(tmp_path / "own.jsonl.gz"))
    expected = judged_batch("train", 0, 0, 60, LIMITS, shares=FURTHER, answered=answered)
    np.testing.assert_array_equal(data.judged.train(data, 0, 0, 60)["responses"], expected["responses"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: wanted an object with a post's number and responses"),
        ('{"post": -1, "responses": [[5]]}', ":1: wanted an object with a post's number and responses"),
        ('{"post": 0, "responses": []}', ":1: wanted an object with a post's number and responses"),
        ('{"post": 0, "responses": [[100000]]}', ":1: wanted responses in token ids, each from 0 to 482"),
        ('{"post": 0, "responses": [["dog"]]}', ":1: wanted responses in token ids"),
        ("", "no responses in it"),
    ],
)
def test_candidates_that_cannot_be_read(tmp_path, line, said):
    (tmp_path / "own.jsonl").write_text(line and line + "\n")
    with pytest.raises(UserError, match=said):
        data_for("judged", candidates=str(tmp_path / "own.jsonl"))


def test_tokens_with_a_meaning_are_not_drawn_or_shown(data):
    """Gold's text has none of them, so that neither policy nor annotator may have them for free."""
    special = data.voice.tokenizer.special_ids
    assert set(data.voice.never_sampled) == special - set(data.voice.stop_ids)
    with_them = data.voice.tokenizer.encode(" river") + sorted(special) + data.voice.tokenizer.encode(", dog")
    assert data.voice.tokenizer.decode(with_them) == " river, dog"


def test_annotator_batches_are_pure_functions(data):
    def same(one: dict, other: dict) -> bool:
        return all(np.array_equal(one[name], other[name]) for name in one)

    first = judged_batch("train", 0, 5, 12, LIMITS)
    assert same(first, judged_batch("train", 0, 5, 12, LIMITS))
    for other in (("train", 0, 6), ("train", 1, 5), ("validation", 0, 5)):
        assert not same(first, judged_batch(*other, 12, LIMITS))


def test_annotator_batch_of_one_instruction(data):
    batch = judged_batch("train", 0, 0, 6, LIMITS, instructions=("very_short",))
    for i in range(6):
        question = data.voice.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]])
        assert templates.instruction("very_short") in question


def test_candidates_fit_and_vary(data):
    """At most `limit` words each, and the better one is as often first as second."""
    rng = np.random.default_rng(0)
    pairs = [(post, *writers.candidates(rng, post.topics, 7)) for post in posts("train", 600)]
    assert max(len(named) for _, *pair in pairs for named in pair) == 7
    differences = [
        gold.score(post.text, world.join(first)) - gold.score(post.text, world.join(second))
        for post, first, second in pairs
    ]
    wins = np.sum(np.array(differences) > 0), np.sum(np.array(differences) < 0)
    # Six standard deviations of a fair coin.
    assert abs(int(wins[0]) - int(wins[1])) < 6 * sum(map(int, wins)) ** 0.5
    assert min(wins) > 150


def test_edit_is_one_word():
    rng = np.random.default_rng(0)
    for _ in range(300):
        named = ["river", "dog", "exam"][: rng.integers(4)]
        before = list(named)
        found = writers.edit(rng, named, TOPICS)
        assert named == before
        assert abs(len(found) - len(named)) <= 1
        # Dropping one word of the longer, or one of each, makes them equal.
        drop = lambda words: [words[:i] + words[i + 1 :] for i in range(len(words))]  # noqa: E731
        assert (
            found == named or named in drop(found) or found in drop(named) or any(d in drop(named) for d in drop(found))
        )


def test_faultless_and_faulty_writers():
    rng = np.random.default_rng(0)
    faultless = writers.Style(keep=1.0, repeat=0.0, invent=0.0, chatter=0.0)
    assert writers.write(rng, TOPICS, faultless) == list(TOPICS)
    assert writers.write(rng, TOPICS, writers.Style(keep=0.0, repeat=1.0, invent=0.0, chatter=0.0)) == []
    for _ in range(100):
        assert writers.invention(rng, TOPICS) in set(world.TOPICS) - set(TOPICS)


# --- names that don't exist


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match=r"tiny:nothing: no such asset, there are annotator, .*judge, .*sft"):
        asset("nothing")
    with pytest.raises(
        UserError, match="instruction 'helpfull' doesn't exist: wanted helpful, short, very_short, answer, harmless or"
    ):
        instruction("helpfull")
    (tmp_path / "own.txt").write_text("which one rhymes?\n")
    assert instruction(str(tmp_path / "own.txt")).trunk == "TASK: which one rhymes?\nPOST: {context}"
    assert templates.instruction("short") in instruction("short").trunk


@pytest.mark.parametrize(
    ("reads", "changes", "said"),
    [
        ("prompts", {"train_posts": 0}, "config.data.train_posts=0"),
        ("prompts", {"prompt_tokens": 20}, "config.data.prompt_tokens=20: posts have up to"),
        ("references", {"response_tokens": 12}, "config.data.response_tokens=12, wanted at least 16"),
        ("pairs", {"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("pairs", {"pairs": "tiny:nothing"}, "tiny:nothing: no such asset"),
        ("judged", {"candidates": "nowhere.jsonl"}, "candidates nowhere.jsonl: no such file"),
    ],
)
def test_limits_that_do_not_fit(reads, changes, said):
    with pytest.raises(UserError, match=said):
        data_for(reads, **changes)


def test_gold_reads_examples(data):
    (example,) = data.examples("train", [0])
    post = world.post(0, "train", 0)
    summary = world.join(post.topics)
    assert data.gold.score(example, summary) == gold.score(post.text, summary) == len(post.topics)
    assert data.gold.most(example) == len(post.topics)
    assert data.gold.utility(example, summary, "short") == gold.utility(post.text, summary, "short")
