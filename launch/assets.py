"""Rebuilds the tiny world's assets: tokenizer, policies, annotators, offline pairs.

    python -m launch.assets --workdir=runs/assets            everything, about an hour on two cores
    python -m launch.assets --workdir=runs/assets --only=sft

Each model is an ordinary run of an experiment file; a stage that is finished in the workdir isn't trained again.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

from absl import flags
from rich.console import Console

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    options.define("workdir", "runs/assets", options.DIR, "where the stages are trained")
    stages = options.choice(("tokenizer", "sft", "annotator", "judge", "pairs"))
    options.define("only", None, stages, "one stage; else all of them")
    cli.parse()

import jax
import numpy as np

from oaif_jax import train
from oaif_jax.data.jsonl import TextPair, write_pairs
from oaif_jax.data.tokenizer import left_pad
from oaif_jax.evals import drawing
from oaif_jax.rollout import named_key
from oaif_jax.run.setup import compute_of, sampler_of, stored_model
from oaif_jax.stored import single
from oaif_jax.tiny import gold, tokenizer_recipe, world
from oaif_jax.tiny.data import ASSETS, Posts, policy_voice
from oaif_jax.types import Prompts

BUDGET = 8 * 2**20  # bytes, of all assets together


@dataclasses.dataclass(frozen=True)
class Writer:
    """One of the policies that wrote the offline pairs: fine-tuned on a writer's references, and how it is sampled."""

    name: str
    init: str  # scratch, or the SFT policy
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
PAIRS = 7680  # 240 steps of 32: what an online run sees
MODELS = {"sft": "tldr,sft", "annotator": "annotator", "judge": "judge"}  # members of experiments/tiny.py


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


def build_pairs(workdir: pathlib.Path) -> None:
    """pairs.jsonl.gz: two different writers' summaries of each post, labelled by the raters' majority; with its recipe."""
    for writer in WRITERS:
        config = cli.load_config(f"experiments/tiny.py:{MODELS['sft']}")
        overrides = {"policy.init": writer.init, "data.writer": writer.style}
        overrides |= {"seed": str(writer.seed), "steps": str(writer.steps)}
        cli.override(config, overrides)
        train.run(config, workdir / f"writer_{writer.name}")
    written = [write_summaries(writer, workdir / f"writer_{writer.name}") for writer in WRITERS]
    voice, limit = policy_voice(), stored_model(workdir / "sft", "best")[0].data.response_tokens
    fits = lambda text: len(voice.answer(text, stop=True)) <= limit  # noqa: E731
    pairs = []
    for index in range(PAIRS):
        rng = world.generator(0, "train", index, purpose=3)
        post = world.post(0, "train", index).text
        one, other = rng.choice(len(WRITERS), size=2, replace=False)
        first, second = written[one][index], written[other][index]
        if first == second or not (fits(first) and fits(second)):
            continue  # nothing to choose, or cut off in the middle of what isn't a word
        is_first, _ = gold.pick(rng, post, first, second)
        pairs.append(TextPair(post, *((first, second) if is_first else (second, first))))
    write_pairs(ASSETS / "pairs.jsonl.gz", pairs)
    quality = {writer.name: quality_of(texts) for writer, texts in zip(WRITERS, written, strict=True)}
    described = [dataclasses.asdict(writer) | {"gold_share": quality[writer.name]} for writer in WRITERS]
    recipe = {"writers": described, "posts": PAIRS, "raters": [dataclasses.asdict(rater) for rater in gold.RATERS]}
    (ASSETS / "pairs_recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def write_summaries(writer: Writer, workdir: pathlib.Path) -> list[str]:
    """A writer's summaries of the first PAIRS training posts; one that wasn't finished is drawn out to its limit."""
    cfg, _, model = stored_model(workdir, "last")
    posts, voice = Posts(cfg.data.seed, "train"), policy_voice()
    sampler, key = sampler_of(cfg, voice, writer.temperature), named_key(jax.random.key(writer.seed), "pairs")
    texts: list[str] = []
    for start in range(0, PAIRS, 128):
        rows = [voice.prompt(posts[index]) for index in range(start, start + 128)]
        tokens, valid = left_pad(rows, cfg.data.prompt_tokens, voice.tokenizer.pad_id, "prompt")
        prompts = Prompts(tokens, valid, np.arange(start, start + 128, dtype=np.int32))  # type: ignore[arg-type]  # numpy's
        made = drawing.respond(model.params, prompts, key, sampler=sampler, cfg=model.cfg, compute=compute_of(cfg))
        tokens, masks = np.asarray(made.tokens)[:, 0], np.asarray(made.mask)[:, 0]
        texts += [voice.text(t[:-1], m[:-1]) for t, m in zip(tokens, masks, strict=True)]
    return texts


def quality_of(texts: list[str]) -> float:
    """Mean gold score as a share of the largest."""
    posts = [world.post(0, "train", index) for index in range(len(texts))]
    scores = [gold.score(post.text, text) for post, text in zip(posts, texts, strict=True)]
    return round(sum(scores) / sum(len(post.topics) for post in posts), 4)


STAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "tokenizer": build_tokenizer,
    **{name: functools.partial(build_model, name) for name in MODELS},
    "pairs": build_pairs,
}


def build(workdir: pathlib.Path, only: str = "") -> None:
    """All stages in their order, or one; then the size of what there is."""
    if only and only not in STAGES:
        raise UserError(f"--only={only}: no such stage, there are {', '.join(STAGES)}")
    for name in [only] if only else list(STAGES):
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
