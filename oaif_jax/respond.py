"""Responses of a run's model to any prompt: what `python -m oaif_jax.sample` does.

python -m oaif_jax.sample --workdir=runs/online_dpo --prompt="we talked about the river. i worry about the exam."
"""

import pathlib

import jax
import numpy as np
from absl import flags

from oaif_jax import cli, runs, tasks
from oaif_jax.data.tokenizer import left_pad
from oaif_jax.errors import UserError
from oaif_jax.evals.preference import respond
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
    """`samples` responses to a prompt (in the tiny world: a post); temperature 0 is greedy."""
    trained = runs.open_run(workdir, which)
    if trained.config.method == "annotator":
        raise UserError(f"--workdir={workdir}: this run trained an annotator, which doesn't write responses")
    data = tasks.tiny_data(trained.config)
    rows = [data.tokenizer.encode(templates.prompt(prompt))]
    tokens, valid = left_pad(rows, trained.config.data.prompt_tokens, data.tokenizer.pad_id, "--prompt")
    pairs = (samples + 1) // 2  # two responses to a row
    batch = {
        "prompts": np.repeat(tokens, pairs, axis=0),
        "prompt_valid": np.repeat(valid, pairs, axis=0),
        "rows": np.arange(pairs, dtype=np.int32),
    }
    made = respond(
        trained.params,
        batch,
        jax.random.key(seed),
        sampler=tasks.sampler_of(trained.config, data, temperature),
        cfg=trained.cfg,
        compute=tasks.compute_of(trained.config),
    )
    drawn = np.asarray(made.tokens).reshape(2 * pairs, -1)
    masks = np.asarray(made.mask).reshape(2 * pairs, -1)
    return [data.text(t, m) for t, m in zip(drawn, masks, strict=True)][:samples]


def main() -> None:
    """The command line."""
    workdir = cli.define_workdir()
    prompt = flags.DEFINE_string("prompt", None, "the post to summarise", required=True)
    samples = flags.DEFINE_integer("samples", 2, "how many responses", lower_bound=1)
    temperature = flags.DEFINE_float("temperature", 0.9, "0 is greedy", lower_bound=0.0)
    seed = flags.DEFINE_integer("seed", 0, "of the draw")
    which = flags.DEFINE_string("checkpoint", "best", "best, last or a step")

    def call() -> None:
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
