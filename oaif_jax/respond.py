"""Responses of a run's model to any prompt: what `python -m oaif_jax.sample` does.

python -m oaif_jax.sample --workdir=runs/online_dpo --prompt="we talked about the river. i worry about the exam."
"""

import math
import pathlib

import jax
import numpy as np
from absl import flags

from oaif_jax import runs, start
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import Tokenizer, left_pad
from oaif_jax.evals.preference import respond
from oaif_jax.tasks.base import compute_of, sampler_of
from oaif_jax.tasks.data import voice_of
from oaif_jax.tiny import templates


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
    trained = runs.open_run(workdir, which)
    cfg = trained.config
    if cfg.method == "annotator":
        raise UserError(f"--workdir={workdir}: this run trained an annotator, which doesn't write responses")
    model = trained.load()
    row, tokenizer, stop_ids = _prompt(trained, prompt)
    tokens, valid = left_pad([row], cfg.data.prompt_tokens, tokenizer.pad_id, "--prompt")
    pairs = (samples + 1) // 2  # two responses to a row
    batch = {
        "prompts": np.repeat(tokens, pairs, axis=0),
        "prompt_valid": np.repeat(valid, pairs, axis=0),
        "rows": np.arange(pairs, dtype=np.int32),
    }
    made = respond(
        model.params,
        batch,
        jax.random.key(seed),
        sampler=sampler_of(cfg, stop_ids, tokenizer.pad_id, temperature),
        cfg=model.cfg,
        compute=compute_of(cfg),
    )
    drawn = np.asarray(made.tokens).reshape(2 * pairs, -1)
    masks = np.asarray(made.mask).reshape(2 * pairs, -1)
    own = [
        [i for i, kept in zip(t, m, strict=True) if kept and i not in stop_ids]
        for t, m in zip(drawn, masks, strict=True)
    ]
    return [tokenizer.decode(ids).strip() for ids in own][:samples]


def _prompt(trained: runs.TrainedRun, text: str) -> tuple[list[int], Tokenizer, tuple[int, ...]]:
    """Token ids of a prompt, the tokenizer, and what ends a response."""
    if trained.config.data.name == "tiny":
        tokenizer = start.tokenizer_of(trained.origin)
        return tokenizer.encode(templates.prompt(text)), tokenizer, tokenizer.stop_ids
    voice = voice_of(trained.origin, trained.config.policy.chat)
    return voice.prompt(Example((Message("user", text),))), voice.tokenizer, voice.stop_ids


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
