"""A pair's row gives what two rows of their own would give, and the compiled program never holds [tokens, V].

CLOSE: log-probabilities of order 10 in float32 (eps 6e-8), summed in another order by another program.
"""

import functools

import fakes
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Models
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.pairs import Pairs
from oaif_jax.models import heads, rows, sharding, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.rollout import score
from oaif_jax.types import Batch, Prompts, Rollout

CLOSE = {"rtol": 2e-5, "atol": 5e-5}
CFG, COMPUTE = fakes.MODEL, fakes.COMPUTE
SLOTS, TOKENS = 5, 4  # S, R


@jax.jit
def logprobs_of(params, prompts, valid, responses, mask):
    asked = Prompts(prompts, valid, jnp.arange(len(prompts)))
    finished = jnp.ones(responses.shape[:2], bool)
    rollout = Rollout(asked, responses, mask, finished, ("data",) * responses.shape[1])
    return score(params, rollout, cfg=CFG, compute=COMPUTE)


@pytest.fixture(scope="module")
def params() -> dict:
    return fakes.make_params()


@functools.cache
def batch() -> tuple[jax.Array, ...]:
    return *fakes.left_padded(5, 4, SLOTS), *fakes.right_padded(6, (4, 2, TOKENS))


@jax.jit
def one_by_one(params, prompts, valid, responses, mask):
    """The textbook's way: each response in a row of its own, all logits, log_softmax."""

    def one(tokens, kept):
        laid_out = rows.trunk(jnp.concatenate([prompts, tokens], 1), jnp.concatenate([valid, kept], 1))
        hidden, _ = transformer.forward(params, laid_out, cfg=CFG, compute=COMPUTE)
        every = jax.nn.log_softmax(hidden[:, SLOTS - 1 : -1] @ params["embedding"][: CFG.vocab_size].T, axis=-1)
        return jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0] * kept

    return jnp.stack([one(responses[:, c], mask[:, c]) for c in range(responses.shape[1])], axis=1)


@functools.partial(jax.jit, static_argnames="how")
def gradient(params, arrays, upstream, *, how):
    return jax.grad(lambda params: jnp.sum(how(params, *arrays) * upstream))(params)


def test_one_row_is_two_rows(params):
    np.testing.assert_allclose(logprobs_of(params, *batch()), one_by_one(params, *batch()), **CLOSE)


def test_gradients_too(params):
    upstream = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, TOKENS)), jnp.float32)
    together, apart = (gradient(params, batch(), upstream, how=how) for how in (logprobs_of, one_by_one))
    # Sums over 32 tokens of numbers of order 1 to 10.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), together, apart)


def test_masked_positions(params):
    """They count 0, and what lies there reaches nothing: bit for bit the same."""
    prompts, valid, responses, mask = batch()
    plain = np.asarray(logprobs_of(params, *batch()))
    assert not mask.all()
    assert (plain[~mask] == 0).all()
    assert (plain[mask] < 0).all()
    other = logprobs_of(params, prompts.at[~valid].set(8), valid, responses.at[~mask].set(9), mask)
    np.testing.assert_array_equal(plain, other)


def test_swapping_the_responses(params):
    """Each response's numbers go with it: neither place is favoured."""
    prompts, valid, responses, mask = batch()
    swapped = logprobs_of(params, prompts, valid, responses[:, ::-1], mask[:, ::-1])
    np.testing.assert_allclose(logprobs_of(params, *batch()), swapped[:, ::-1], **CLOSE)


def test_wider_rows(params):
    """More columns of padding, in the prompt and in the responses, change nothing."""
    prompts, valid, responses, mask = batch()
    wide = [jnp.pad(x, ((0, 0), (2, 0))) for x in (prompts, valid)]
    wide += [jnp.pad(x, ((0, 0), (0, 0), (0, 3))) for x in (responses, mask)]
    found = logprobs_of(params, *wide)
    np.testing.assert_allclose(found[..., :TOKENS], logprobs_of(params, *batch()), **CLOSE)
    assert (found[..., TOKENS:] == 0).all()


def test_probabilities_add_up_to_one(params):
    """All one-token responses to a prompt, side by side in one row."""
    prompts, valid = fakes.left_padded(7, 1, SLOTS)
    every = jnp.arange(CFG.vocab_size, dtype=jnp.int32).reshape(1, -1, 1)
    found = logprobs_of(params, prompts, valid, every, jnp.ones(every.shape, bool))
    np.testing.assert_allclose(np.exp(np.asarray(found, np.float64)).sum(), 1.0, rtol=1e-5)


# --- the compiled program. Sizes that nothing else has: V 1152 (1100 padded), 104 response tokens, 124 in all.

WIDE = ModelConfig(vocab_size=1100, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24)
CHUNK, RESPONSE_TOKENS = 32, 4 * 2 * 13


@pytest.fixture(scope="module")
def pair_gradient() -> list[hlo.Instruction]:
    """The gradient of the pair loss as it is trained on, policy and reference."""
    params = jax.eval_shape(functools.partial(transformer.init, cfg=WIDE), jax.random.key(0))
    rollout = fakes.rollout_of(fakes.prompts_of(0, 4, 5), 0, 2, 13)
    pairs = Pairs(jnp.zeros(4, jnp.int32), jnp.ones(4, jnp.int32), jnp.ones(4))
    method, models = Offline(PairLoss("dpo", (("beta", 0.1),))), Models(WIDE, WIDE, ComputeConfig(head_chunk=CHUNK))

    def loss(policy, reference, rollout, pairs):
        logps = method.predict(policy, reference, Batch(), rollout, models=models, prefilled=None)
        return method.loss(logps, pairs).total

    compiled = jax.jit(jax.grad(loss)).lower(params, params, rollout, pairs).compile()
    return hlo.everything(hlo.parse(compiled.as_text()))


def test_no_array_of_tokens_and_vocabulary(pair_gradient):
    """Of arrays with a vocabulary dimension the largest are the embedding [V, D] and one chunk's logits [CHUNK, V]."""
    most = hlo.largest(pair_gradient, WIDE.padded_vocab_size)
    assert most == max(CHUNK, WIDE.width) * WIDE.padded_vocab_size
    # In no other form either: not flattened, and not as chunks side by side.
    assert (
        max(np.prod(shape) for line in pair_gradient for shape in line.shapes)
        < RESPONSE_TOKENS * WIDE.padded_vocab_size
    )


def test_such_an_array_would_be_found():
    """The same reader, where all tokens are one chunk."""
    params = jax.eval_shape(functools.partial(transformer.init, cfg=WIDE), jax.random.key(0))

    def total(params, hidden, targets):
        return jnp.sum(heads.token_logprobs(params, hidden, targets, cfg=WIDE, compute=ComputeConfig()))

    lowered = jax.jit(jax.grad(total)).lower(
        params, jnp.ones((RESPONSE_TOKENS, WIDE.width)), jnp.ones(RESPONSE_TOKENS, int)
    )
    found = hlo.everything(hlo.parse(lowered.compile().as_text()))
    assert hlo.largest(found, WIDE.padded_vocab_size) == RESPONSE_TOKENS * WIDE.padded_vocab_size


def test_devices_share_the_head():
    """Each of eight computes the logits of its own rows: an eighth of the operations, and no more."""
    params = jax.eval_shape(functools.partial(transformer.init, cfg=WIDE), jax.random.key(0))
    mesh = sharding.make_mesh(8, 1, 1)
    on, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def operations(on, everywhere) -> float:
        shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on)  # noqa: E731
        whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), params)
        args = (whole, shaped((16, 2, 8, WIDE.width), jnp.float32), shaped((16, 2, 8), jnp.int32))
        score = functools.partial(heads.token_logprobs, cfg=WIDE, compute=ComputeConfig(head_chunk=32))
        return jax.jit(score).lower(*args).compile().cost_analysis()["flops"]

    assert operations(on, everywhere) < 1.1 / 8 * operations(None, None)
