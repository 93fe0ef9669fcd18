"""Prints responses of a run's model to any prompt.

    python -m oaif_jax.sample --workdir=runs/quickstart \\
        --prompt="my sister asked about the wedding. we talked about the river. i worry about the exam."

In the tiny world a prompt is a post to summarise, or one with a question at its end; else what a user says.
"""

import pathlib

from absl import flags

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.text import printable

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_workdir()
    options.define(
        "prompt", None, options.TEXT, "the post to summarise or to answer about, or what a user says", required=True
    )
    options.define("samples", 2, options.integer(least=1, most=1024), "how many responses")
    options.define("temperature", 0.9, options.number(least=0, most=100), "of sampling; 0 is greedy")
    options.define("seed", 0, options.integer(least=0, most=2**31 - 1), "of the draw")
    cli.define_checkpoint()
    cli.parse()
    cli.import_jax()

import jax
import numpy as np

from oaif_jax import methods
from oaif_jax.base.phases import phase
from oaif_jax.data.open import has_conversations
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import left_pad
from oaif_jax.evals import drawing
from oaif_jax.run.setup import compute_of, sampler_of, stored_model
from oaif_jax.types import Prompts


def run(
    workdir: str | pathlib.Path,
    prompt: str,
    *,
    samples: int = 2,
    temperature: float = 0.9,
    seed: int = 0,
    which: str = "best",
) -> list[str]:
    """`samples` responses to a prompt (in the tiny world: a post, with a question or without; else a user's message); temperature
    0 is greedy."""
    cfg, _, model = stored_model(workdir, which)
    trained = {"agreement": "an annotator", "reward": "a reward model"}.get(methods.named(cfg.method).evaluation)
    if trained is not None:
        raise UserError(f"--workdir={workdir}: this run trained {trained}, which doesn't write responses")
    voice = model.voice
    row = voice.prompt(Example((Message("user", prompt),), is_conversation=has_conversations(cfg.data)))
    limit = "config.data.prompt_tokens"
    tokens, valid = left_pad([row], cfg.data.prompt_tokens, voice.tokenizer.pad_id, "--prompt", limit)
    pairs = (samples + 1) // 2  # two responses to a row
    repeated = (np.repeat(each, pairs, axis=0) for each in (tokens, valid))
    with phase("sampling"):
        made = drawing.draw(
            model.whole(model.params),
            Prompts(*repeated, np.arange(pairs, dtype=np.int32)),  # type: ignore[arg-type]  # numpy's
            jax.random.key(seed),
            voice=voice,
            sampler=sampler_of(cfg, voice, temperature),
            cfg=model.cfg,
            compute=compute_of(cfg),
        )
    return [text for two in made.texts for text in two][:samples]


def main() -> None:
    """Prints the responses that the command line asks for."""
    given = flags.FLAGS
    responses = run(
        given.workdir,
        given.prompt,
        samples=given.samples,
        temperature=given.temperature,
        seed=given.seed,
        which=given.checkpoint,
    )
    print(printable("\n".join(responses)))


if __name__ == "__main__":
    cli.call(main)
