"""The embedded world: its posts, what the gold judge says of summaries, its tokenizer, raters and training data."""

import dataclasses
import itertools
import unicodedata

import fakes
import numpy as np
import pytest

from oaif_jax.base.errors import UserError
from oaif_jax.data.jsonl import TextPair
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.tiny import gold, templates, tokenizer_recipe, world, writers
from oaif_jax.tiny.data import MARKS, TinyData, asset, instruction_text, mark_of

POST = "hello everyone. we talked about the river. my friend loves the dog. i am so tired. i worry about the exam."
TOPICS = ("river", "dog", "exam")
PROMPT_TOKENS, RESPONSE_TOKENS = 56, 16  # as the experiments have them
MANY = 3000


@pytest.fixture(scope="module")
def data() -> TinyData:
    return TinyData(Tokenizer(asset("tokenizer")), 0, PROMPT_TOKENS, RESPONSE_TOKENS)


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
    assert prompts["prompt_valid"].sum(-1).max() <= data.longest_prompt() <= PROMPT_TOKENS
    for writer in writers.STYLES:
        texts = dataclasses.replace(data, writer=writer).references(split, indices)
        made = data.responses([[text] for text in texts], stop=True)
        assert made["mask"].sum(-1).max() <= RESPONSE_TOKENS
        assert max(len(world.words(text)) for text in texts) <= world.MAX_WORDS
    for name in templates.INSTRUCTIONS:
        assert data.questions(templates.instruction(name)).batch(drawn)["question_valid"].any(-1).all()


def test_longest_prompt(data):
    """Made of the longest sentences, it is longer than any post, and a post that long can be."""
    lengths = [len(data.tokenizer.encode(templates.prompt(post.text))) for post in posts("train", MANY)]
    assert data.longest_prompt() - 4 <= max(lengths) <= data.longest_prompt()


def test_a_prompt_that_is_too_long(data):
    short = dataclasses.replace(data, prompt_tokens=20)
    with pytest.raises(UserError, match=r"prompt 0 has \d+ tokens, wanted 1 to 20"):
        short.prompts(posts("train", 1))


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
        ("river dog. exam", 3.0),
        ("dogs, xyz", -0.5),
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


def test_order_and_commas_do_not_matter():
    for rng, post, named in random_summaries():
        expected = gold.score(post.text, world.join(named))
        assert gold.score(post.text, world.join(list(rng.permutation(named)))) == expected
        assert gold.score(post.text, " ".join(named)) == expected
        shuffled = ". ".join(rng.permutation(post.text.split(". ")))
        assert gold.score(shuffled, world.join(named)) == expected


@pytest.mark.parametrize(("instruction", "best"), [("helpful", 5), ("short", 3), ("very_short", 2)])
def test_how_many_topics_pay(instruction, best):
    """Naming a third topic just pays under `short`, a second under `very_short`, and all under `helpful`."""
    post = next(post for post in posts("train", 50) if len(post.topics) == 5)
    useful = [gold.utility(post.text, world.join(post.topics[:count]), instruction) for count in range(6)]
    assert int(np.argmax(useful)) == best
    assert useful[0] == 0.0


def test_utility_by_hand():
    """Two words cost c (1 + 2), three c (1 + 2 + 3): c is 0.3 for short, 0.4 for very short."""
    for instruction, summary, expected in (
        ("helpful", "river, dog", 2.0),
        ("short", "river, dog", 2.0 - 0.9),
        ("very_short", "river, dog", 2.0 - 1.2),
        ("short", "river, dog, hello", 1.75 - 1.8),
        ("very_short", "", 0.0),
    ):
        assert gold.utility(POST, summary, instruction) == pytest.approx(expected)


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
    texts += [f"{templates.CUE} {text}" for text in data.references("train", range(200))]
    for name in templates.INSTRUCTIONS:
        question = templates.annotation(POST, templates.instruction(name))
        texts += [question, f"{question}{templates.FIRST} river{templates.SECOND} dog{templates.CLOSING}1"]
    for text in texts:
        ids = data.tokenizer.encode(text)
        assert data.tokenizer.decode(ids) == text
        assert max(ids) < data.tokenizer.vocab_size
        assert not set(ids) & {data.tokenizer.pad_id, *data.tokenizer.stop_ids}


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
        ids = data.tokenizer.encode(text)
        assert data.tokenizer.decode(ids) == text
        assert not set(ids) & {data.tokenizer.pad_id, *data.tokenizer.stop_ids}, "text made an id that has a meaning"


def test_one_word_is_one_token(data):
    """Summaries' words with the space before them, commas, answers, marks: a token each."""
    for word in (*world.TOPICS, *world.CHATTER, "yes", "no"):
        assert data.tokenizer.decode([data.tokenizer.single(f" {word}")]) == f" {word}"
    for piece in (",", *templates.ANSWERS, *MARKS, *templates.MARKS, "\n"):
        assert data.tokenizer.decode([data.tokenizer.single(piece)]) == piece
    named = ["river", "hello", "dog"]
    assert len(data.ids(world.join(named), stop=False)) == 2 * len(named) - 1
    assert data.ids("", stop=True) == [data.tokenizer.stop_ids[0]]


def test_pieces_join_in_context(data):
    """Parts that are joined as ids are what the whole text would be: policy's row, annotator's row, its answers."""
    encode = data.tokenizer.encode
    prompt = templates.prompt(POST)
    assert [*encode(prompt), *data.ids("river, dog", stop=False)] == encode(f"{prompt} river, dog")
    template = data.template()
    question, first, second = templates.annotation(POST, "what?"), "river, dog", "boat"
    row = [*encode(question), *template.first, *data.ids(first, stop=False), *template.second]
    row += [*data.ids(second, stop=False), *template.closing]
    text = f"{question}{templates.FIRST} {first}{templates.SECOND} {second}{templates.CLOSING}"
    assert row == encode(text)
    for answer, token in zip(templates.ANSWERS, template.answers, strict=True):
        assert [*row, token] == encode(text + answer)


def test_tokenizer_is_what_its_recipe_makes(tmp_path, data):
    tokenizer_recipe.train(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == data.tokenizer.path.read_bytes()


# --- arrays


def test_prompts_and_responses_come_back_as_text(data):
    drawn = posts("validation", 20)
    prompts = data.prompts(drawn)
    summaries = [("river, dog", ""), ("hello", "boat, boat")] * 10
    made = data.responses(summaries, stop=True)
    for i, post in enumerate(drawn):
        kept = prompts["prompts"][i][prompts["prompt_valid"][i]]
        assert data.tokenizer.decode(kept) == templates.prompt(post.text)
        for c in range(2):
            assert data.text(made["responses"][i, c], made["mask"][i, c]) == summaries[i][c]
            assert made["responses"][i, c][made["mask"][i, c]][-1] == data.tokenizer.stop_ids[0]


def test_pair_batch_puts_the_chosen_first(data):
    batch = data.pair_batch([TextPair(POST, "river, dog", "boat"), TextPair(POST, "", "exam")])
    assert batch["first_is_better"].all()
    texts = [
        [data.text(t, m) for t, m in zip(*row, strict=True)]
        for row in zip(batch["responses"], batch["mask"], strict=True)
    ]
    assert texts == [["river, dog", "boat"], ["", "exam"]]


def test_sft_batch_is_post_and_reference(data):
    batch = data.sft_batch("train", np.array([7, 3]))
    for i, index in enumerate((7, 3)):
        text = data.text(batch["responses"][i, 0], batch["mask"][i, 0])
        assert text == writers.reference(0, "train", index)
        prompt = data.tokenizer.decode(batch["prompts"][i][batch["prompt_valid"][i]])
        assert prompt == templates.prompt(world.post(0, "train", index).text)


def test_marks():
    """Half a topic apart, from a to z; 0 is o."""
    assert MARKS[int(mark_of(np.array(0.0)))] == "o"
    np.testing.assert_array_equal(mark_of(np.array([-100.0, -1.0, 0.5, 5.0, 100.0])), [0, 12, 15, 24, 25])


def test_choices_break_ties_by_taste(data):
    batch = data.annotator_batch("train", 0, 1, 60)
    chosen = set()
    for i, (label, choice) in enumerate(zip(batch["label"], batch["choice"], strict=True)):
        if label != 0.5:
            assert choice == label
            continue
        post = data.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]]).split(templates.POST)[1]
        texts = [data.text(batch["responses"][i, j], batch["mask"][i, j]) for j in range(2)]
        assert choice == {True: 1.0, False: 0.0, None: 0.5}[gold.first_in_tie(post, *texts)]
        chosen.add(float(choice))
    assert chosen == {0.0, 0.5, 1.0}


def recompute(data: TinyData, batch: dict, i: int, j: int, instruction: str) -> tuple[list[int], list[int], float]:
    """A summary's word targets and marks, token by token, and its utility, all from the texts in the batch."""
    question = data.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]])
    start, end = templates.annotation("", templates.instruction(instruction)), ""
    assert question.startswith(start)
    post = question.removeprefix(start) + end
    words = world.words(data.text(batch["responses"][i, j], batch["mask"][i, j]))
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
    batch = data.annotator_batch("train", 0, 1, 60, lists=lists)
    comma = data.tokenizer.single(",")
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


def test_annotator_batches_are_pure_functions(data):
    def same(one: dict, other: dict) -> bool:
        return all(np.array_equal(one[name], other[name]) for name in one)

    first = data.annotator_batch("train", 0, 5, 12)
    assert same(first, data.annotator_batch("train", 0, 5, 12))
    for other in (("train", 0, 6), ("train", 1, 5), ("validation", 0, 5)):
        assert not same(first, data.annotator_batch(*other, 12))


def test_annotator_batch_of_one_instruction(data):
    batch = data.annotator_batch("train", 0, 0, 6, instructions=("very_short",))
    for i in range(6):
        question = data.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]])
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
    with pytest.raises(UserError, match=r"tiny:nothing: no such asset, there are .*tokenizer"):
        asset("nothing")
    with pytest.raises(UserError, match="instruction 'helpfull' doesn't exist: wanted helpful, short, very_short or"):
        instruction_text("helpfull")
    (tmp_path / "own.txt").write_text("which one rhymes?\n")
    assert instruction_text(str(tmp_path / "own.txt")) == "which one rhymes?"
    assert instruction_text("short") == templates.instruction("short")


def test_world_without_the_trained_tokenizer():
    """Nothing but the limits depends on the tokenizer."""
    plain = TinyData(fakes.ByteTokenizer(), 0, 400, 120)
    made = plain.sft_batch("train", np.array([0]))
    assert plain.text(made["responses"][0, 0], made["mask"][0, 0]) == writers.reference(0, "train", 0)
