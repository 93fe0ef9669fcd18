"""Prints responses of a run's model to any prompt.

    python -m oaif_jax.sample --workdir=runs/online_dpo --prompt="we talked about the river. i worry about the exam."

In the tiny world a prompt is a post to summarise, else what a user says.
"""

import pathlib

from absl import flags

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_workdir()
    options.define("prompt", None, options.TEXT, "the post to summarise, or what a user says", required=True)
    options.define("samples", 2, options.integer(least=1, most=1024), "how many responses")
    options.define("temperature", 0.9, options.number(least=0, most=100), "of sampling; 0 is greedy")
    options.define("seed", 0, options.integer(least=0, most=2**31 - 1), "of the draw")
    cli.define_checkpoint()
    cli.parse()

import jax
import numpy as np

from oaif_jax import runs, start
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
    print("\n".join(responses))


if __name__ == "__main__":
    cli.call(main)
