"""Responses of a run's model to any prompt: what `python -m oaif_jax.sample` does.

python -m oaif_jax.sample --workdir=runs/online_dpo --prompt="we talked about the river. i worry about the exam."
"""

import math
import pathlib

import jax
import numpy as np
from absl import flags

from oaif_jax import methods
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
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
    """`samples` responses to a prompt (in the tiny world: a post; else a user's message); temperature 0 is greedy."""
    cfg, _, model = stored_model(workdir, which)
    if methods.named(cfg.method).evaluation == "agreement":
        raise UserError(f"--workdir={workdir}: this run trained an annotator, which doesn't write responses")
    voice = model.voice
    row = voice.prompt(Example((Message("user", prompt),)))
    tokens, valid = left_pad([row], cfg.data.prompt_tokens, voice.tokenizer.pad_id, "--prompt")
    pairs = (samples + 1) // 2  # two responses to a row
    repeated = (np.repeat(each, pairs, axis=0) for each in (tokens, valid))
    made = drawing.draw(
        model.params,
        Prompts(*repeated, np.arange(pairs, dtype=np.int32)),  # type: ignore[arg-type]  # numpy's
        jax.random.key(seed),
        voice=voice,
        sampler=sampler_of(cfg, voice, temperature),
        cfg=model.cfg,
        compute=compute_of(cfg),
    )
    return [text for two in made.texts for text in two][:samples]


def main() -> None:
    """The command line."""
    workdir = cli.define_workdir()
    prompt = flags.DEFINE_string("prompt", None, "the post to summarise", required=True)
    samples = flags.DEFINE_integer("samples", 2, "how many responses", lower_bound=1, upper_bound=1024)
    temperature = flags.DEFINE_float("temperature", 0.9, "0 is greedy", lower_bound=0.0, upper_bound=100.0)
    seed = flags.DEFINE_integer("seed", 0, "of the draw", lower_bound=0, upper_bound=2**31 - 1)
    which = flags.DEFINE_string("checkpoint", "best", "best, last or a step")

    def call() -> None:
        if math.isnan(temperature.value):
            raise UserError("--temperature=nan, wanted a number")
        if not prompt.value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt.value):
            raise UserError("--prompt isn't UTF-8, wanted a text")
        responses = run(
            workdir.value,
            prompt.value,
            samples=samples.value,
            temperature=temperature.value,
            seed=seed.value,
            which=which.value,
        )
        print("\n".join(responses))

    cli.run_main(call)


if __name__ == "__main__":
    main()
