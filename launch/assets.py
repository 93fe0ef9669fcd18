"""Rebuilds the tiny world's assets: tokenizer, policies, annotators, offline pairs.

    python -m launch.assets --workdir=runs/assets            everything, about two hours on two cores
    python -m launch.assets --workdir=runs/assets --only=sft

Each model is an ordinary run of an experiment file; a stage that is finished in the workdir isn't trained again.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    options.define("workdir", "runs/assets", options.DIR, "where the stages are trained")
    of_asked = ("sft_asked", "annotator_asked", "judge_asked", "pairs_helpful", "pairs_harmless")
    stages = options.choice(
        (
            "tokenizer",
            "sft",
            "sft_s",
            "sft_strong",
            "annotator",
            "judge",
            "annotator_xs",
            "annotator_s",
            "pairs",
            *of_asked,
        )
    )
    options.define("only", None, stages, "one stage; else all of them")
    cli.parse()
    cli.import_jax()

import jax
import jax.numpy as jnp
import numpy as np

from oaif_jax import train
from oaif_jax.annotate import orders
from oaif_jax.config import Config
from oaif_jax.data.dataset import Arrays
from oaif_jax.data.jsonl import TextPair, write_pairs
from oaif_jax.data.tokenizer import left_pad
from oaif_jax.evals import agreement, drawing
from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler, named_key
from oaif_jax.run.setup import compute_of, sampler_of, stored_model
from oaif_jax.stored import single
from oaif_jax.stored.open import Model, read_run
from oaif_jax.tiny import degenerate, gold, templates, tokenizer_recipe, world, written
from oaif_jax.tiny.data import ASSETS, Limits, Posts, Shares, dataset, held_out, judged_batch, policy_voice
from oaif_jax.tiny.tasks import TASKS
from oaif_jax.types import Prompts

BUDGET = 16 * 10**6  # bytes, of all assets together


@dataclasses.dataclass(frozen=True)
class Writer:
    """One of the policies that wrote the offline pairs: fine-tuned on a writer's references, and how it is sampled."""

    name: str
    init: str  # scratch, or an SFT policy
    style: str
    seed: int
    steps: int
    temperature: float


# Weaker and better than the SFT policy, which isn't among them: the pairs are off-policy, as in the paper.
WRITERS = (
    Writer("early", "scratch", "reference", 11, 800, 1.0),
    Writer("careless", "scratch", "careless", 12, 1200, 1.0),
    Writer("careful", "tiny:sft", "careful", 13, 800, 0.7),
)
# A policy that begins better: larger, and on better references.
STRONG = Writer("strong", "tiny:sft_s", "careful", 14, 800, 1.0)
ASKED_WRITERS = (
    Writer("early_asked", "tiny:sft", "reference", 14, 500, 1.0),
    Writer("careless_asked", "tiny:sft_asked", "careless", 15, 300, 1.0),
    Writer("careful_asked", "tiny:sft_asked", "careful", 16, 300, 0.7),
)
PAIRS = 7680  # 240 steps of 32: what an online run sees
# Members of experiments/tiny.py.
MODELS = {"sft": "tldr,sft", "sft_s": "tldr,sft,s", "annotator": "annotator", "judge": "judge"}
MODELS |= {"sft_asked": "helpful,sft", "annotator_asked": "annotator,asked", "judge_asked": "judge,asked"}


@dataclasses.dataclass(frozen=True)
class Learner:
    """A policy that is trained online against an earlier annotator, to see what that one likes."""

    seed: int
    against: int  # which annotator: from scratch, or after so many trainings
    steps: int = 160
    lr: float = 1e-3
    beta: float = 0.03


@dataclasses.dataclass(frozen=True)
class Further:
    """One more training of an annotator, on what these learners wrote and those of the trainings before."""

    seed: int
    steps: int
    learners: tuple[Learner, ...]


# Learners as in the experiments, and some that break their annotator: a higher rate, a weaker hold on the reference. The judge
# is made apart: other learners, other posts, other seeds.
FURTHER = {
    "annotator": (
        Further(2, 400, (Learner(11, 0, 240, 5e-4), Learner(101, 0, beta=0.01), Learner(102, 0, lr=2e-3))),
        Further(4, 600, (Learner(104, 1, lr=2e-3, beta=0.01), Learner(105, 1, lr=4e-3))),
    ),
    "judge": (Further(3, 500, (Learner(112, 0, lr=4e-3), Learner(113, 1, lr=2e-3, beta=0.01))),),
}
ANSWERED = {"annotator": range(512), "judge": range(512, 1024)}  # training posts that its learners answer
# Smaller annotators: seed and steps of their trainings on the candidates that the annotator ended with; the smallest is slow.
SMALLER = {"annotator_xs": (5, 4000), "annotator_s": (6, 1000)}
FRESH_SEED = 987  # of pairs that no model was trained on
CHUNK = 128  # posts that are answered at a time
KEPT = 40  # steps between the checkpoints at which they do


def build_tokenizer(workdir: pathlib.Path) -> None:
    """tokenizer.model, trained on the world's texts."""
    del workdir
    ASSETS.mkdir(exist_ok=True)
    tokenizer_recipe.train(ASSETS / "tokenizer.model")


def build_model(name: str, workdir: pathlib.Path) -> None:
    """NAME.safetensors: an experiment's best checkpoint, in bfloat16."""
    file = f"experiments/tiny.py:{MODELS[name]}"
    train.run(cli.load_config(file), workdir / name)
    _, step, best = stored_model(workdir / name, "best")
    recipe = f"python -m oaif_jax.train --config={file} (step {step})"
    single.save(ASSETS / f"{name}.safetensors", best.params, best.cfg, recipe)


def build_strong(workdir: pathlib.Path) -> None:
    """sft_strong.safetensors: the larger policy, fine-tuned further on careful references."""
    train_writer(STRONG, workdir / "sft_strong", "sft_s")
    save_last("sft_strong", workdir / "sft_strong")


def train_writer(writer: Writer, run: pathlib.Path, model: str) -> None:
    """Trains a writer's policy."""
    config = cli.load_config(f"experiments/tiny.py:{MODELS[model]}")
    overrides = {"policy.init": writer.init, "data.writer": writer.style}
    overrides |= {"seed": str(writer.seed), "steps": str(writer.steps)}
    cli.override(config, overrides)
    train.run(config, run)


def build_asked(name: str, workdir: pathlib.Path) -> None:
    """NAME.safetensors, and its agreement with gold by kind: an annotator of summaries, trained further to judge answers."""
    train.run(cli.load_config(f"experiments/tiny.py:{MODELS[name]}"), workdir / name)
    stored = save_last(name, workdir / name)
    agreement = by_kind(stored, {}, task="helpful")
    (ASSETS / f"{name}_recipe.json").write_text(json.dumps({"agreement": agreement}, indent=2) + "\n")


def build_annotator(name: str, workdir: pathlib.Path) -> None:
    """NAME.safetensors, and NAME_candidates.jsonl.gz with their recipe: trained from scratch to compare, then further on
    degenerate text and on what learners wrote."""
    file = f"experiments/tiny.py:{MODELS[name]}"
    train.run(cli.load_config(file), workdir / f"{name}_0")
    answers: dict[int, list[list[int]]] = {index: [] for index in ANSWERED[name]}
    described, candidates, run = [], pathlib.Path(), workdir
    for time, further in enumerate(FURTHER[name], 1):
        for learner in further.learners:
            train.run(learning(learner, workdir), workdir / f"learner_{learner.seed}")
            found = answered(workdir / f"learner_{learner.seed}", ANSWERED[name], learner.seed)
            described.append(dataclasses.asdict(learner) | {"by_step": found.described})
            for index, ids in found.responses:
                answers[index].append(ids)
        candidates, run = workdir / f"{name}_{time}.jsonl.gz", workdir / f"{name}_{time}"
        written.write(candidates, answers)
        train.run(trained_further(name, time, workdir, candidates), run)
    save_annotator(name, run, candidates, described)


def build_smaller(name: str, workdir: pathlib.Path) -> None:
    """NAME.safetensors, and its agreement with gold by kind: trained from scratch as the annotator, then further on
    the candidates that that one ended with."""
    file = f"experiments/tiny.py:annotator,{name.removeprefix('annotator_')}"
    train.run(cli.load_config(file), workdir / f"{name}_0")
    config = cli.load_config(file)
    overrides = {"policy.init": trained(name, 0, workdir), "data.candidates": "tiny:annotator_candidates"}
    seed, steps = SMALLER[name]
    overrides |= {"seed": seed, "steps": steps, "optimizer.warmup": 40}
    cli.override(config, {key: str(value) for key, value in overrides.items()})
    train.run(config, workdir / f"{name}_1")
    stored = save_last(name, workdir / f"{name}_1")
    (ASSETS / f"{name}_recipe.json").write_text(json.dumps({"agreement": by_kind(stored, {})}, indent=2) + "\n")


def save_last(name: str, run: pathlib.Path) -> Model:
    """NAME.safetensors: what a run ended with; as it is read again."""
    _, step, last = stored_model(run, "last")
    single.save(
        ASSETS / f"{name}.safetensors", last.params, last.cfg, f"python -m launch.assets --only={name} (step {step})"
    )
    return dataclasses.replace(last, params=single.load(ASSETS / f"{name}.safetensors")[0])


def save_annotator(name: str, run: pathlib.Path, candidates: pathlib.Path, learners: list[dict]) -> None:
    """An annotator as an asset, with its candidates, who wrote them, and its agreement with gold by kind."""
    stored = save_last(name, run)
    (ASSETS / f"{name}_candidates.jsonl.gz").write_bytes(candidates.read_bytes())
    described = {
        "posts": [ANSWERED[name].start, ANSWERED[name].stop],
        "learners": learners,
        "agreement": by_kind(stored, {}),
    }
    (ASSETS / f"{name}_candidates_recipe.json").write_text(json.dumps(described, indent=2) + "\n")


def learning(learner: Learner, workdir: pathlib.Path) -> ConfigDict:
    """A learner's config."""
    config = cli.load_config("experiments/tiny.py:tldr,online,dpo")
    overrides = {"seed": learner.seed, "steps": learner.steps, "optimizer.lr": learner.lr, "loss.beta": learner.beta}
    overrides |= {"annotator.init": trained("annotator", learner.against, workdir)}
    overrides |= {"checkpoint.every": KEPT, "checkpoint.keep": learner.steps // KEPT + 1}
    overrides |= {"eval.every": 2 * KEPT, "eval.prompts": 64, "eval.final_prompts": 64}
    cli.override(config, {key: str(value) for key, value in overrides.items()})
    return config


def trained(name: str, time: int, workdir: pathlib.Path) -> str:
    """An annotator after so many further trainings: its best on ordinary candidates at first, then what it ended with."""
    return f"{workdir / f'{name}_{time}'}@{'last' if time else 'best'}"


def trained_further(name: str, time: int, workdir: pathlib.Path, candidates: pathlib.Path) -> ConfigDict:
    """The config of an annotator's further training."""
    config, further = cli.load_config(f"experiments/tiny.py:{MODELS[name]}"), FURTHER[name][time - 1]
    before = trained(name, time - 1, workdir)
    overrides = {"policy.init": before, "data.candidates": candidates, "seed": further.seed, "steps": further.steps}
    overrides |= {"optimizer.warmup": 40}
    cli.override(config, {key: str(value) for key, value in overrides.items()})
    return config


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a learner wrote: (post, token ids) each, and the mean gold score by step, as a share of the largest."""

    responses: list[tuple[int, list[int]]]
    described: dict[str, float]


def answered(run: pathlib.Path, indices: range, seed: int) -> Answers:
    """Two responses of a learner to each of some training posts, at each checkpoint."""
    found, quality = [], {}
    for step in range(KEPT, read_run(run, "last")[0].steps + 1, KEPT):
        cfg, _, model = stored_model(run, str(step))
        tokens, masks = drawn(cfg, model, indices, sampler_of(cfg, policy_voice(), cfg.sample.temperature), seed)
        stop, texts = policy_voice().stop_ids, []
        for place in range(2):
            for index, row, mask in zip(indices, tokens[:, place], masks[:, place], strict=True):
                found.append((index, [int(token) for token in row[mask] if token not in stop]))
                texts.append(policy_voice().text(row, mask))
        quality[str(step)] = quality_of(texts, [*indices] * 2)
    return Answers(found, quality)


def by_kind(
    asked: Model,
    candidates: Mapping[str, pathlib.Path],
    kinds: Sequence[str] = (),
    count: int = 512,
    task: str = "tldr",
) -> dict[str, dict[str, float]]:
    """Agreement with gold, and of the two orders, on a task's fresh pairs of each kind of candidates, by default of all: ordinary
    ones under each instruction, and under the first each degenerate kind and what learners wrote, by a name for each file of
    `candidates`."""
    instructions = templates.TASKS[task]
    kinds = kinds or (*instructions, *degenerate.KINDS)
    answered = {name: written.read(path, asked.voice.tokenizer.vocab_size) for name, path in candidates.items()}
    shares = {name: Shares(degenerate=1.0) if name in degenerate.KINDS else Shares() for name in kinds}
    shares |= dict.fromkeys(answered, Shares(written=1.0))

    def fresh(name: str, number: int) -> Arrays:
        return judged_batch(
            *("test", FRESH_SEED, number, CHUNK, Limits(FRESH_SEED, 56, 16)),
            shares=shares[name],
            answered=answered.get(name, ()),
            kinds=(name,) if name in degenerate.KINDS else tuple(degenerate.KINDS),
            instructions=(name,) if name in instructions else instructions[:1],
            task=TASKS[task],
        )

    data = dataset("judged", seed=FRESH_SEED, train_posts=1, prompt_tokens=56, response_tokens=16, task=task)
    assert data.judged is not None
    assert data.judged.around is not None
    template = orders.Template(**data.judged.around)  # type: ignore[arg-type]
    makes = {name: functools.partial(fresh, name) for name in shares}
    judged = dataclasses.replace(data.judged, held_out=lambda *_: held_out(count, CHUNK, template, makes))
    metrics, _ = agreement.evaluate(
        jax.tree.map(lambda x: jnp.asarray(x, "float32"), asked.params),
        data=dataclasses.replace(data, judged=judged),
        split="test",
        count=count,
        chunk=CHUNK,
        policy=asked,
        compute=ComputeConfig(),
        place=lambda batch: jax.tree.map(jnp.asarray, batch),
    )
    kept = ("pairs", "decided", "gold_agreement", "order_agreement")
    return {name: {key: round(found[key], 4) for key in kept} for name, found in metrics["annotator"].items()}


def build_pairs(name: str, workdir: pathlib.Path, task: str = "tldr") -> None:
    """NAME.jsonl.gz: two different writers' responses to each prompt of a task, labelled by the raters' majority; with its
    recipe. Questions have the same responses in both tasks, and other labels."""
    sft, by = ("sft", WRITERS) if task == "tldr" else ("sft_asked", ASKED_WRITERS)
    for writer in by:
        train_writer(writer, workdir / f"writer_{writer.name}", sft)
    responses = [write_responses(writer, workdir / f"writer_{writer.name}") for writer in by]
    voice, limit = policy_voice(), stored_model(workdir / sft, "best")[0].data.response_tokens
    fits = lambda text: len(voice.answer(text, stop=True)) <= limit  # noqa: E731
    pairs = []
    for index in range(PAIRS):
        rng = world.generator(0, "train", index, purpose=3)
        post = TASKS[task].post(0, "train", index).text
        one, other = rng.choice(len(by), size=2, replace=False)
        first, second = responses[one][index], responses[other][index]
        if first == second or not (fits(first) and fits(second)):
            continue  # nothing to choose, or cut off in the middle of what isn't a word
        is_first, _ = gold.pick(rng, post, first, second, task)
        pairs.append(TextPair(post, *((first, second) if is_first else (second, first))))
    write_pairs(ASSETS / f"{name}.jsonl.gz", pairs)
    quality = {writer.name: quality_of(texts, range(PAIRS), task) for writer, texts in zip(by, responses, strict=True)}
    described = [dataclasses.asdict(writer) | {"gold_share": quality[writer.name]} for writer in by]
    recipe = {"writers": described, "posts": PAIRS, "raters": [dataclasses.asdict(rater) for rater in gold.RATERS]}
    (ASSETS / f"{name}_recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def write_responses(writer: Writer, workdir: pathlib.Path) -> list[str]:
    """A writer's responses to the first PAIRS training prompts; one that wasn't finished is drawn out to its limit."""
    cfg, _, model = stored_model(workdir, "last")
    voice = policy_voice()
    tokens, masks = drawn(cfg, model, range(PAIRS), sampler_of(cfg, voice, writer.temperature), writer.seed)
    return [voice.text(t[:-1], m[:-1]) for t, m in zip(tokens[:, 0], masks[:, 0], strict=True)]


def drawn(cfg: Config, model: Model, indices: range, sampler: Sampler, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two responses of a policy to each of some training prompts: tokens and mask [B, 2, R]."""
    posts = Posts(cfg.data.seed, "train", task=TASKS[cfg.data.task])
    voice, key = policy_voice(), named_key(jax.random.key(seed), "pairs")
    found = []
    with phase("drawing responses", len(indices)) as under_way:
        for part in drawing.chunks(len(indices), CHUNK):
            part = indices.start + np.asarray(part, np.int32)
            rows = [voice.prompt(posts[int(index)]) for index in part]
            tokens, valid = left_pad(rows, cfg.data.prompt_tokens, voice.tokenizer.pad_id, "prompt")
            prompts = Prompts(tokens, valid, part)  # type: ignore[arg-type]  # numpy's
            made = drawing.respond(model.params, prompts, key, sampler=sampler, cfg=model.cfg, compute=compute_of(cfg))
            found.append((np.asarray(made.tokens), np.asarray(made.mask)))
            under_way.at(min(CHUNK * len(found), len(indices)))
    tokens, masks = map(np.concatenate, zip(*found, strict=True))
    return tokens[: len(indices)], masks[: len(indices)]


def quality_of(texts: list[str], indices: Sequence[int], task: str = "tldr") -> float:
    """Mean gold score of responses to a task's training prompts, as a share of the largest."""
    prompts = [TASKS[task].post(0, "train", index).text for index in indices]
    scores = [gold.score(prompt, text, task) for prompt, text in zip(prompts, texts, strict=True)]
    return round(sum(scores) / sum(gold.worth(prompt, task).most for prompt in prompts), 4)


STAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "tokenizer": build_tokenizer,
    "sft": functools.partial(build_model, "sft"),
    "sft_s": functools.partial(build_model, "sft_s"),
    "sft_strong": build_strong,
    **{name: functools.partial(build_annotator, name) for name in FURTHER},
    **{name: functools.partial(build_smaller, name) for name in SMALLER},
    "pairs": functools.partial(build_pairs, "pairs"),
    "sft_asked": functools.partial(build_model, "sft_asked"),
    **{name: functools.partial(build_asked, name) for name in ("annotator_asked", "judge_asked")},
    **{f"pairs_{task}": functools.partial(build_pairs, f"pairs_{task}", task=task) for task in ("helpful", "harmless")},
}


def build(workdir: pathlib.Path, only: str = "") -> None:
    """All stages in their order, or one; then the size of what there is."""
    if only and only not in STAGES:
        raise UserError(f"--only={only}: no such stage, there are {', '.join(STAGES)}")
    for name in [only] if only else list(STAGES):
        with phase(f"building {name}"):
            STAGES[name](workdir)
    size = sum(path.stat().st_size for path in ASSETS.iterdir())
    if size > BUDGET:
        raise UserError(f"{ASSETS} holds {size} bytes, wanted at most {BUDGET}")
    Console().print(f"assets: {size / 2**20:.1f} MiB in {ASSETS}")


def main() -> None:
    """Builds what the command line asks for."""
    build(pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.only or "")


if __name__ == "__main__":
    cli.call(main)
