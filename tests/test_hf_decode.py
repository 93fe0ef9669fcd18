"""Every family's greedy tokens through the prefix and suffix caches, against transformers' generate."""

import functools

import hf_fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler, sample
from oaif_jax.stored import hf
from oaif_jax.types import Prompts

TOKENS = 20
NEVER = -1  # a stop id that no token has
SAMPLER = Sampler(temperature=0.0, top_k=0, top_p=1.0, max_tokens=TOKENS, stop_ids=(NEVER,), pad_id=0)


def generate(model, prompts: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Greedy tokens of transformers, [rows, TOKENS]."""
    import torch

    ids, mask = (torch.tensor(each.astype(np.int64)) for each in (prompts, valid))
    found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    return found[:, prompts.shape[1] :].numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "scanned") for name in ("llama", "mistral", "phi3", "gemma2", "gemma3", "qwen2", "qwen3", "gpt_neox")]
    + [(name, "unrolled") for name in ("gemma3", "qwen2", "gpt_neox")],  # few rows: weights output by output
)
def test_greedy_tokens(name, way, tmp_path):
    """Prompts are longer than the windows, so that local layers forget parts of the prefix while decoding."""
    theirs = hf_fakes.make(name)
    theirs.save_pretrained(tmp_path)
    model = hf.read(tmp_path)
    prompts, valid = hf_fakes.batch(rows=4, slots=16)
    expected = generate(theirs, prompts, valid)
    assert len(np.unique(expected)) > 2 * len(prompts), "too few different tokens to tell anything"
    ours = jax.jit(
        functools.partial(sample, sampler=SAMPLER, completions=2, cfg=model.cfg, compute=ComputeConfig(decode=way)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    asked = Prompts(*map(jnp.asarray, (prompts, valid)), jnp.arange(len(prompts)))
    found = ours(hf_fakes.load(model), asked, jax.random.key(0))
    for completion in (0, 1):  # both go on from one prefix, greedily
        np.testing.assert_array_equal(found.tokens[:, completion], expected)
    assert not found.finished.any()
    assert found.mask.all()
