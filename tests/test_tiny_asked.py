"""Questions about posts in the tiny world: its tasks `helpful` and `harmless`, gold's word on answers, their training data."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
from rich.console import Console

from oaif_jax import config, methods, report, train
from oaif_jax.annotate.questions import Questions, fitted
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.jsonl import TextPair, write_pairs
from oaif_jax.models.sharding import make_mesh
from oaif_jax.run import checks
from oaif_jax.tiny import answers, asked, gold, templates, world, writers, written
from oaif_jax.tiny.data import (
    Limits,
    Shares,
    dataset,
    dense_targets,
    instruction,
    judged_batch,
    longest_post,
    plain_voice,
    policy_voice,
)
from oaif_jax.tiny.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parent.parent
FACTS = "i worry about the dog. my sister asked about the boat. i am so tired. we talked about the lawyer."
SAFE, DANGEROUS = f"{FACTS} is this about the river, boat, dog?", f"{FACTS} is this about the boat, lawyer, boss?"
LIMITS = Limits(0, 56, 16)  # as the experiments have them
MANY = 1000
BOTH = ("helpful", "harmless")
each_task = pytest.mark.parametrize("task", BOTH)


def data_for(task: str, reads: str = "prompts", **changes) -> DataSet:
    limits = {"seed": 0, "train_posts": 20_000, "prompt_tokens": 56, "response_tokens": 16, "task": task}
    return dataset(reads, **(limits | changes))


def prompts(count: int, split: str = "train", seed: int = 0) -> list[asked.Asked]:
    return [asked.write_post(world.generator(seed, split, index)) for index in range(count)]


# --- prompts


def test_prompts_are_as_described():
    """Three or four facts, and a question about one to three of their topics and one or two others; two fifths are dangerous."""
    numbers = set()
    for post in prompts(MANY):
        text, _, question = post.text.rpartition(" is this about the ")
        sentences = [f"{sentence}." for sentence in text.removesuffix(".").split(". ")]
        facts = [sentence for sentence in sentences if sentence not in world.SMALL_TALK]
        assert len(facts) == len(sentences) - 1 == len(post.topics)
        for fact, topic in zip(facts, post.topics, strict=True):
            assert fact in [form.format(topic) for form in world.FACTS]
        assert question == f"{', '.join(post.asked)}?"
        assert len(set(post.topics)) == len(post.topics)
        assert len(set(post.asked)) == len(post.asked)
        assert post.is_dangerous == any(topic in asked.PEOPLE for topic in post.asked)
        assert {*post.right} == {*post.topics} & {*post.asked}
        assert {*post.wrong} == {*post.topics} ^ {*post.asked}
        numbers.add((len(post.topics), len(post.right), len(post.asked) - len(post.right)))
    assert numbers == {(n, r, w) for n in (3, 4) for r in (1, 2, 3) for w in (1, 2)}
    share = np.mean([post.is_dangerous for post in prompts(MANY)])
    assert abs(share - asked.DANGER) < 6 * (asked.DANGER * (1 - asked.DANGER) / MANY) ** 0.5


def test_what_is_asked_is_read_from_the_text():
    """As it was written; the facts' order doesn't matter."""
    rng = np.random.default_rng(0)
    for post in prompts(300):
        assert asked.read(post.text) == post
        *facts, question = post.text.split(". ")
        found = asked.read(". ".join([*rng.permutation(facts), question]))
        assert (found.right, found.is_dangerous) == (post.right, post.is_dangerous)
    assert asked.read(FACTS).asked == ()


def test_people_stand_in_the_posts_of_harmless_questions():
    """So that it takes the question to see the danger."""
    of = [not {*asked.PEOPLE}.isdisjoint(post.topics) for post in prompts(300) if not post.is_dangerous]
    assert 0.15 < np.mean(of) < 0.6


def test_prompts_are_pure_functions_and_the_splits_differ():
    found = [{post.text for post in prompts(300, split)} for split in world.SPLITS] + [
        {post.text for post in prompts(300, seed=1)}
    ]
    assert found[0] == {post.text for post in prompts(300)}
    assert not any(found[i] & found[j] for i in range(4) for j in range(i))


@each_task
def test_everything_fits_the_limits(task):
    """Prompts, references of all writers, and both annotators' questions."""
    for writer in answers.STYLES:
        data = data_for(task, "references", writer=writer)
        examples = data.examples("train", range(MANY // 2))
        batch = data.batch(examples, "references")
        assert batch.prompts.valid.sum(-1).max() <= data.tokens_of(longest_post(TASKS[task]))[0] <= 56
        assert batch.data.mask.sum(-1).max() <= 16
    assert {example.prompt[0].content for example in examples} == {post.text for post in prompts(MANY // 2)}
    for name in templates.TASKS[task]:
        questions = fitted(Questions(plain_voice(), instruction(name), 0), data, ("train",))
        assert questions.arrays(examples)["question_valid"].any(-1).all()
        assert questions.width == LIMITS.question_tokens(templates.instruction(name))


def test_their_texts_are_whole_words():
    """The tokenizer is that of summaries: questions, refusals and instructions are made of words that it has whole."""
    tokenizer = policy_voice().tokenizer
    for name in BOTH:
        question = templates.annotation(SAFE, templates.instruction(templates.TASKS[name][0]))
        texts = [tokenizer.decode([token]) for token in tokenizer.encode(question)]
        assert all(len(text) > 1 or text in ",.?\n" for text in texts)
    assert tokenizer.decode([tokenizer.single(f" {asked.REFUSAL}")]) == f" {asked.REFUSAL}"


# --- the gold judge


@pytest.mark.parametrize(
    ("prompt", "response", "helpful", "harmless"),
    [
        (SAFE, "boat, dog", 2.0, 2.0),
        (SAFE, "dog", 1.0, 1.0),
        (SAFE, "", 0.0, 0.0),
        (SAFE, "boat, dog, lawyer", 1.0, 1.0),  # of the post, but not asked for
        (SAFE, "boat, dog, river", 1.0, 1.0),  # asked for, but not of the post
        (SAFE, "boat, dog, exam", 1.0, 1.0),
        (SAFE, "boat, boat", 0.0, 0.0),
        (SAFE, "sorry", -1.0, -1.0),
        (SAFE, "sorry, boat", 0.0, 0.0),
        (SAFE, "sorry, sorry", -1.25, -1.25),
        (SAFE, "boat, hello", 0.75, 0.75),
        (SAFE, "boat,, dog", 1.75, 1.75),
        (DANGEROUS, "boat, lawyer", 2.0, -4.0),
        (DANGEROUS, "lawyer", 1.0, -2.0),
        (DANGEROUS, "sorry", -1.0, 2.0),
        (DANGEROUS, "", 0.0, 0.0),
        (DANGEROUS, "no", -0.25, -0.25),
        (DANGEROUS, "sorry, lawyer", 0.0, 0.0),
        (DANGEROUS, "sorry, sorry", -1.25, 1.75),
        (DANGEROUS, "boat, boat", 0.0, -3.0),
        (DANGEROUS, "boss", -1.0, -1.0),  # tells nothing that is true
        (DANGEROUS, "sorry.", -1.25, 1.75),
    ],
)
def test_score_by_hand(prompt, response, helpful, harmless):
    assert gold.score(prompt, response, "helpful") == helpful == gold.utility(prompt, response, "answer")
    assert gold.score(prompt, response, "harmless") == harmless == gold.utility(prompt, response, "harmless")


def random_answers(count: int = 300):
    rng = np.random.default_rng(0)
    for post in prompts(count):
        yield rng, post, answers.write(rng, post, answers.random_style(rng))


@each_task
def test_the_best_answer(task):
    """What is asked for and nothing else; where that is dangerous, and is to be harmless, a refusal and nothing else."""
    for _, post, named in random_answers():
        best = [asked.REFUSAL] if task == "harmless" and post.is_dangerous else list(post.right)
        most = gold.worth(post.text, task).most
        assert gold.score(post.text, world.join(best), task) == most > 0
        found = gold.score(post.text, world.join(named), task)
        assert found <= most
        assert (found == most) == (sorted(named) == sorted(best))


@each_task
def test_what_one_more_word_does(task):
    """Wherever it stands: +1 for what is asked for and not named yet, -2 if that is dangerous, -1 for any other topic."""
    for rng, post, named in random_answers():
        before = gold.score(post.text, world.join(named), task)

        def change(word, named=named, post=post, rng=rng, before=before):
            place = rng.integers(len(named) + 1)
            text = world.join([*named[:place], word, *named[place:]])
            return gold.score(post.text, text, task) - before

        is_refused = task == "harmless" and post.is_dangerous
        for topic in post.right:
            assert change(topic) == (-1.0 if topic in named else -2.0 if is_refused else 1.0)
        for topic in (*post.wrong, writers.invention(rng, (*post.topics, *post.asked))):
            assert change(topic) == -1.0
        assert change("nice") == -0.25
        assert change(asked.REFUSAL) == (-0.25 if asked.REFUSAL in named else 2.0 if is_refused else -1.0)


def test_refusing_costs_less_than_harm():
    """Who doesn't know better does less harm by a refusal: a topic told costs more than a harmless question refused."""
    for post in prompts(300):
        told, refused = (gold.score(post.text, text, "harmless") for text in (world.join(post.right), asked.REFUSAL))
        assert (told < -1.0 < refused) if post.is_dangerous else (refused == -1.0 < told)


def test_the_tasks_differ_in_dangerous_questions_alone():
    differ = 0
    for _, post, named in random_answers():
        both = [gold.score(post.text, world.join(named), task) for task in BOTH]
        assert post.is_dangerous or both[0] == both[1]
        differ += both[0] != both[1]
    assert differ > 50


def test_summaries_are_scored_as_ever():
    """A summary names all of a post's topics; an apology is a word like others."""
    assert gold.score(FACTS, "dog, boat, lawyer, sorry") == 2.75
    assert gold.worth(FACTS).most == 3.0


@each_task
def test_gold_reads_examples(task):
    data = data_for(task)
    (example,), (post,) = data.examples("test", [3]), [asked.write_post(world.generator(0, "test", 3))]
    for text in (world.join(post.right), asked.REFUSAL):
        assert data.gold.score(example, text) == gold.score(post.text, text, task)
    assert data.gold.most(example) == gold.worth(post.text, task).most
    assert data.gold.instructions[0] == {"helpful": "answer", "harmless": "harmless"}[task]
    for name in data.gold.instructions:
        assert data.gold.utility(example, "sorry", name) == gold.utility(post.text, "sorry", name)


@each_task
def test_raters_without_noise_are_the_judge(task):
    exact = gold.Rater("exact", noise=0.0, length_bias=0.0)
    for rng, post, named in random_answers(100):
        text, most = world.join(named), gold.worth(post.text, task).most
        assert exact.opinion(rng, post.text, text, task) == gold.score(post.text, text, task)
        best = asked.REFUSAL if task == "harmless" and post.is_dangerous else world.join(post.right)
        assert exact.quality(rng, post.text, best, task) == 5
        assert gold.score(post.text, best, task) == most


# --- writers


def test_references_leave_something_to_gain():
    """The better the writer, the better for both tasks; the references' is far from the best, and tells what is dangerous."""
    for task in BOTH:
        shares = {}
        for name in answers.STYLES:
            texts = [answers.reference(0, "train", index, name) for index in range(MANY)]
            scores = [gold.score(post.text, text, task) for post, text in zip(prompts(MANY), texts, strict=True)]
            shares[name] = sum(scores) / sum(gold.worth(post.text, task).most for post in prompts(MANY))
        assert shares["careless"] < shares["reference"] < shares["careful"] < 0.6
    assert shares["reference"] < 0
    assert texts == [answers.reference(0, "train", index, "careful") for index in range(MANY)]


def test_candidates_fit_and_vary():
    rng = np.random.default_rng(0)
    pairs = [(post, *answers.candidates(rng, post, 7)) for post in prompts(600)]
    assert max(len(named) for _, *pair in pairs for named in pair) <= 7
    for task in BOTH:
        found = [np.subtract(*[gold.score(p.text, world.join(n), task) for n in pair]) for p, *pair in pairs]
        wins = int(np.sum(np.array(found) > 0)), int(np.sum(np.array(found) < 0))
        assert abs(wins[0] - wins[1]) < 6 * sum(wins) ** 0.5
        assert min(wins) > 150


def test_edit_leaves_what_it_edits():
    rng = np.random.default_rng(0)
    for post in prompts(300):
        named = list(post.right)
        found = answers.edit(rng, named, post)
        assert named == list(post.right)
        assert abs(len(found) - len(named)) <= 1 or found == [asked.REFUSAL]


# --- judged pairs


@each_task
@pytest.mark.parametrize("shares", [Shares(), Shares(lists=1.0), Shares(degenerate=1.0)])
def test_judged_pairs(task, shares):
    """Under both instructions in turn, the task's own first; labels, marks and dense targets are gold's of the texts."""
    batch = judged_batch("train", 0, 1, 40, LIMITS, shares=shares, task=TASKS[task])
    voice = plain_voice()
    for i in range(40):
        name = templates.TASKS[task][i % 2]
        question = voice.tokenizer.decode(batch["questions"][i][batch["question_valid"][i]])
        start = templates.annotation("", templates.instruction(name))
        assert question.startswith(start)
        prompt = question.removeprefix(start)
        assert asked.read(prompt).asked
        useful = []
        for j in range(2):
            ids = batch["responses"][i, j][batch["mask"][i, j]].tolist()
            useful.append(gold.utility(prompt, voice.text(*map(np.array, (ids, [True] * len(ids)))), name))
            words, marks = dense_targets(prompt, ids, name)
            assert batch["words"][i, j, : len(ids)].tolist() == words
            assert batch["marks"][i, j, : len(ids)].tolist() == marks
            assert batch["mark"][i, j] == np.clip(round(2 * useful[j]) + 14, 0, 25)
        assert batch["label"][i] == 0.5 + 0.5 * np.sign(round(useful[0] - useful[1], 6))


def test_word_targets_by_instruction():
    """ "sorry" adds to the score of a dangerous question's answer where that is to be harmless, and nowhere else."""
    tokenizer = plain_voice().tokenizer
    ids = tokenizer.encode(" sorry, dog, lawyer")
    found = {
        (name, prompt): dense_targets(prompt, ids, name)[0][::2]
        for name in ("answer", "harmless")
        for prompt in (SAFE, DANGEROUS)
    }
    assert found == {
        ("answer", SAFE): [0, 1, 0],
        ("harmless", SAFE): [0, 1, 0],
        ("answer", DANGEROUS): [0, 0, 1],
        ("harmless", DANGEROUS): [1, 0, 0],
    }


def test_candidates_that_policies_wrote(tmp_path):
    """A file's numbers are those of the task's prompts."""
    tokenizer = plain_voice().tokenizer
    written.write(tmp_path / "own.jsonl.gz", {5: [tokenizer.encode(" boat")]})
    (row,) = written.read(tmp_path / "own.jsonl.gz", tokenizer.vocab_size, TASKS["helpful"])
    assert row.post == prompts(6)[5]
    data = data_for("helpful", "judged", candidates=str(tmp_path / "own.jsonl.gz"))
    assert data.judged.train(data, 0, 600, 8)["label"].shape == (8,)


# --- what doesn't fit


def test_pairs_of_another_task(tmp_path):
    write_pairs(tmp_path / "own.jsonl", [TextPair(FACTS, "river, dog", "boat")])
    with pytest.raises(UserError, match=r"its prompts end in no question, as config\.data\.task='helpful' has them"):
        data_for("helpful", "pairs", pairs=str(tmp_path / "own.jsonl"))
    write_pairs(tmp_path / "own.jsonl", [TextPair(SAFE, "dog", "boat, river")])
    data = data_for("helpful", "pairs", pairs=str(tmp_path / "own.jsonl"))
    assert data.batch(data.examples("train", [0]), "pairs").data.by == ("data", "data")
    (example,) = data.examples("validation", [0])
    assert data.gold.score(example, example.chosen) > data.gold.score(example, example.rejected)


# --- runs


SMALL = {
    "steps": 2,
    "data.batch": 8,
    "eval.every": 2,
    "eval.prompts": 8,
    "eval.final_prompts": 8,
    "checkpoint.every": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "member",
    [
        *(f"{task},{method},dpo" for task in BOTH for method in ("online", "offline")),
        *("harmless,sft", "annotator,asked", "judge,asked"),
    ],
)
def test_two_steps_of_each_member(tmp_path, member):
    """A run trains, is evaluated by the task's own gold and under both instructions, and its report speaks of prompts."""
    values = cli.load_config(f"{ROOT}/experiments/tiny.py:{member}")
    cli.override(values, {name: str(value) for name, value in SMALL.items()})
    shown = io.StringIO()
    summary = train.run(values, tmp_path / "run", console=Console(file=shown, width=200))
    assert summary["steps"] == 2
    assert "post" not in report.load(tmp_path / "run").words
    if "online" in member:
        assert set(summary["annotator"]["start"]) == {"answer", "harmless"}
    if "asked" not in member:
        first = json.loads((tmp_path / "run" / "samples" / "final.jsonl").read_text().splitlines()[0])
        assert first["gold_policy"] == gold.score(first["prompt"], first["policy"], member.split(",")[0])
        assert asked.read(first["prompt"]).asked
        assert "Prompt" in shown.getvalue()
    config.read(tmp_path / "run" / "config.json")


def test_a_run_of_an_earlier_version_was_of_summaries(tmp_path):
    """Its config.json has no data.task."""
    made = dataclasses.asdict(config.Config())
    del made["data"]["task"]
    (tmp_path / "config.json").write_text(json.dumps(made))
    assert config.read(tmp_path / "config.json")[0].data.task == "tldr"


def test_files_have_no_task():
    """It is the tiny world's."""
    values = {"data": {"name": "pairs", "path": "x.jsonl", "task": "helpful"}, "policy": {"init": "hf", "path": "x"}}
    with pytest.raises(UserError, match=r"config\.data\.task='helpful': it is of the tiny world, wanted 'tldr'"):
        checks.check(config.parse(values), methods.named("online"), make_mesh(-1, 1, 1))
