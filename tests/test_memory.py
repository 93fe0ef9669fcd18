"""Memory of compiled programs: no array of tokens by vocabulary, and what recomputation in the backward pass saves."""

import functools

import fakes
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oaif_jax import step
from oaif_jax.annotate.orders import Template
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Models
from oaif_jax.methods.online import Online
from oaif_jax.models import transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.step import Step
from oaif_jax.types import Batch
from oaif_jax.update import state

# --- the online step with a vocabulary of 262,144 words, and a model as narrow as a chunk of the head

VOCABULARY = 262_144
MODEL = ModelConfig(vocab_size=VOCABULARY, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=6)
ROWS, SLOTS, RESPONSE, CHUNK = 2, 5, 8, 4
TOKENS = ROWS * 2 * RESPONSE  # that are scored
SAMPLER = Sampler(temperature=0.9, top_k=0, top_p=1.0, max_tokens=RESPONSE, stop_ids=(1, 2), pad_id=0)
TEMPLATE = Template(first=(3, 4), second=(3, 6), closing=(7,), answers=(10, 11))
TX = optax.adamw(1e-3)


def online_step(chunk: int) -> list[hlo.Instruction]:
    """The compiled step: sample, annotate, update; of shapes only, nothing is allocated."""
    compute = ComputeConfig(head_chunk=chunk)
    asked = fakes.Asked(TEMPLATE, MODEL, SAMPLER.stop_ids, compute)
    method = Online(PairLoss("dpo", (("beta", 0.1),)), "loses")
    take = functools.partial(step.train_step, step=Step(method, Models(MODEL, MODEL, compute), SAMPLER, asked), tx=TX)
    params = jax.eval_shape(functools.partial(transformer.init, cfg=MODEL), jax.random.key(0))
    start = jax.eval_shape(lambda tree: state.TrainState(jnp.array(0, jnp.int32), tree, TX.init(tree)), params)
    questions = dict(zip(("questions", "question_valid"), fakes.left_padded(0, ROWS, SLOTS + 4), strict=True))
    batch = Batch(fakes.prompts_of(0, ROWS, SLOTS), question=questions)
    frozen = {"reference": params, "annotator": params}
    lowered = jax.jit(take, donate_argnames="state").lower(start, frozen, batch, jax.random.key(0))
    return hlo.everything(hlo.parse(lowered.compile().as_text()))


def largest(program: list[hlo.Instruction]) -> int:
    """Elements of the largest array there is, of any shape."""
    return max(int(np.prod(shape)) for line in program for shape in line.shapes)


@pytest.mark.slow
def test_no_array_of_tokens_and_vocabulary():
    """Nothing is larger than the embedding [V, D], a chunk of the head [CHUNK, V], and sampling's logits [2 B, V]: with a
    vocabulary dimension or flattened."""
    assert MODEL.width == CHUNK == 2 * ROWS < TOKENS
    program = online_step(CHUNK)
    assert hlo.largest(program, VOCABULARY) == CHUNK * VOCABULARY
    assert largest(program) == CHUNK * VOCABULARY


@pytest.mark.slow
def test_such_an_array_would_be_found():
    """The same step with all tokens in one chunk."""
    assert hlo.largest(online_step(TOKENS), VOCABULARY) == TOKENS * VOCABULARY


# --- recomputation

DEEP = ModelConfig(vocab_size=43, width=16, layers=8, heads=4, kv_heads=2, head_dim=8, mlp=48)
REMATS = ("none", "dots", "layer")


def gradient_bytes(remat: str) -> int:
    """What the gradient of eight layers needs beside its inputs and outputs."""
    params = jax.eval_shape(functools.partial(transformer.init, cfg=DEEP), jax.random.key(0))
    rows = transformer.Rows(
        jnp.zeros((8, 64), jnp.int32),
        jnp.broadcast_to(jnp.arange(64)[None], (8, 64)),
        jnp.ones((8, 64), bool),
        slots=64,
        branches=0,
    )

    def loss(params):
        return jnp.sum(transformer.forward(params, rows, cfg=DEEP, compute=ComputeConfig(remat=remat))[0])

    return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes


def test_recomputation_saves_memory():
    """Measured: 19.4, 5.6 and 2.7 MB. (That gradients stay the same is a test of the transformer.)"""
    none, dots, layer = map(gradient_bytes, REMATS)

    assert layer < 0.7 * dots
    assert dots < 0.7 * none


def test_unknown_remat():
    with pytest.raises(ValueError, match=r"remat='all', wanted one of none, dots, layer"):
        ComputeConfig(remat="all")
