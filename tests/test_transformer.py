"""Who sees whom, and that every way of computing the same thing gives the same numbers.

Tolerances: activations are of order 1 and float32's eps is 6e-8; sums over at most some hundred terms, in an order that
differs from program to program, stay below CLOSE. Where no arithmetic differs, equality is exact.
"""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax.models import heads, layers, rows, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig, RopeScaling
from oaif_jax.models.layers import frequencies
from oaif_jax.models.sharding import make_mesh

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
CFG, COMPUTE = fakes.MODEL, fakes.COMPUTE
SLOTS, BRANCHES, TOKENS = 5, 2, 4  # S, C, R

forward = jax.jit(transformer.forward, static_argnames=("cfg", "compute", "keep_prefix"))
decode = jax.jit(transformer.decode, static_argnames=("cfg", "compute"))
logits = jax.jit(heads.logits, static_argnames="cfg")
rotate = jax.jit(layers.rotate)


@pytest.fixture(scope="module")
def params() -> dict:
    return fakes.make_params()


def hidden_of(params, laid_out: rows.Rows, cfg: ModelConfig = CFG, compute: ComputeConfig = COMPUTE) -> np.ndarray:
    return np.asarray(forward(params, laid_out, cfg=cfg, compute=compute)[0])


@functools.cache
def batch() -> tuple[jax.Array, ...]:
    """Prompts and responses of several lengths: tokens, valid [3, S] and tokens, valid [3, C, R]."""
    return *fakes.left_padded(1, 3, SLOTS), *fakes.right_padded(2, (3, BRANCHES, TOKENS))


@functools.partial(jax.jit, static_argnames=("slots", "branches"))
def influence(params, tokens, positions, valid, *, slots: int, branches: int) -> jax.Array:
    """[T, T]: how much the hidden state of a column moves with the embedding of another column's token.

    Each column has a token id of its own, so that the gradient in a row of the embedding is the gradient in a column.
    """
    laid_out = rows.Rows(tokens, positions, valid, slots=slots, branches=branches)

    def outputs(embedding):
        hidden, _ = transformer.forward(params | {"embedding": embedding}, laid_out, cfg=CFG, compute=COMPUTE)
        # A direction that isn't the same for all features: the norm would hide a sum over them.
        return hidden[0] @ jnp.linspace(-1.0, 2.0, CFG.width)

    return jnp.linalg.norm(jax.jacrev(outputs)(params["embedding"])[:, tokens[0]], axis=-1)


def influence_of(params, laid_out: rows.Rows) -> np.ndarray:
    arrays = (laid_out.tokens, laid_out.positions, laid_out.valid)
    return np.asarray(influence(params, *arrays, slots=laid_out.slots, branches=laid_out.branches))


def unlike(count: int) -> jax.Array:
    """Different token ids, [1, count]."""
    return jnp.arange(3, 3 + count, dtype=jnp.int32)[None]


def test_causality(params):
    seen = influence_of(params, rows.trunk(unlike(7), jnp.ones((1, 7), bool)))
    assert (seen[np.tril_indices(7)] > 0).all()
    assert (seen[np.triu_indices(7, 1)] == 0).all()


def test_padding_is_not_seen(params):
    """In: 0 0 1 1 1. Columns see earlier valid ones and themselves, and nothing else."""
    valid = np.array([0, 0, 1, 1, 1], bool)
    seen = influence_of(params, rows.trunk(unlike(5), jnp.asarray(valid[None])))
    np.testing.assert_array_equal(seen > 0, np.tril(np.ones((5, 5), bool)) & valid | np.eye(5, dtype=bool))


def test_branches_do_not_see_one_another(params):
    """The example of rows.branch, longer, and with holes: exactly 0 where a column isn't seen."""
    trunk_valid, branch_valid = np.array([[0, 1, 1]], bool), np.array([[[1, 1, 0], [1, 0, 1]]], bool)
    tokens = unlike(9)
    laid_out = rows.branch(
        tokens[:, :3], jnp.asarray(trunk_valid), tokens[:, 3:].reshape(1, 2, 3), jnp.asarray(branch_valid)
    )
    seen = influence_of(params, laid_out) > 0
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 1, 0, 0],
            [0, 1, 1, 0, 0, 0, 1, 1, 0],
            [0, 1, 1, 0, 0, 0, 1, 0, 1],
        ],
        bool,
    )
    np.testing.assert_array_equal(seen, expected)


def test_layout_of_branches():
    """In: a trunk of 2 after one column of padding, branches of 2 and 1 -> Out: positions go on from the trunk's in both."""
    laid_out = rows.branch(
        jnp.array([[0, 7, 8]]),
        jnp.array([[False, True, True]]),
        jnp.array([[[1, 2], [3, 0]]]),
        jnp.array([[[True, True], [True, False]]]),
    )
    np.testing.assert_array_equal(laid_out.tokens, [[0, 7, 8, 1, 2, 3, 0]])
    np.testing.assert_array_equal(laid_out.positions, [[0, 0, 1, 2, 3, 2, 2]])
    np.testing.assert_array_equal(laid_out.valid, np.array([[0, 1, 1, 1, 1, 1, 0]], bool))
    assert (laid_out.slots, laid_out.branches) == (3, 2)


def test_left_padding_changes_nothing(params):
    tokens, valid, _, _ = batch()
    wide = [jnp.pad(x, ((0, 0), (3, 0))) for x in (tokens.at[~valid].set(9), valid)]
    near, far = hidden_of(params, rows.trunk(tokens, valid)), hidden_of(params, rows.trunk(*wide))
    np.testing.assert_allclose(near[valid], far[:, 3:][valid], **CLOSE)


def test_what_lies_under_the_mask_changes_nothing(params):
    """Bit for bit: the same program, and no number of it that counts is different."""
    tokens, valid, responses, mask = batch()
    plain = hidden_of(params, rows.branch(tokens, valid, responses, mask))
    laid_out = rows.branch(tokens.at[~valid].set(11), valid, responses.at[~mask].set(12), mask)
    np.testing.assert_array_equal(plain[laid_out.valid], hidden_of(params, laid_out)[laid_out.valid])


def test_branches_are_rows_of_their_own(params):
    """[trunk | branch 1 | branch 2] is [trunk | branch 1] and [trunk | branch 2], each a plain causal row."""
    tokens, valid, responses, mask = batch()
    together = hidden_of(params, rows.branch(tokens, valid, responses, mask))
    own = together[:, SLOTS:].reshape(3, BRANCHES, TOKENS, -1)
    alone = np.stack(
        [
            hidden_of(
                params,
                rows.trunk(*(jnp.concatenate(x, 1) for x in ((tokens, responses[:, c]), (valid, mask[:, c])))),
            )
            for c in range(BRANCHES)
        ],
        axis=1,
    )
    np.testing.assert_allclose(together[:, :SLOTS][valid], alone[:, 0, :SLOTS][valid], **CLOSE)
    np.testing.assert_allclose(own[mask], alone[:, :, SLOTS:][mask], **CLOSE)


def test_rotation_is_relative():
    """q at p meets k at s as q at p + d meets k at s + d; and lengths stay."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(6, CFG.head_dim)), jnp.float32) for _ in range(2))
    radians = frequencies(CFG.head_dim, 1e4, RopeScaling())
    p, s = jnp.array([0, 3, 17, 40, 99, 500]), jnp.array([0, 1, 20, 2, 98, 3])

    def meet(shift: int) -> jax.Array:
        return jnp.sum(rotate(q, p + shift, radians) * rotate(k, s + shift, radians), axis=-1)

    # Angles of up to 1,500 radians are rounded to 6e-5 in float32.
    np.testing.assert_allclose(meet(0), meet(1000), atol=1e-3)
    assert np.abs(meet(0) - jnp.sum(q * k, axis=-1))[1:].max() > 0.1
    np.testing.assert_allclose(jnp.sum(rotate(q, p, radians) ** 2, -1), jnp.sum(q**2, -1), rtol=1e-5)


def test_rows_are_relative(params):
    tokens, valid, responses, mask = batch()
    laid_out = rows.branch(tokens, valid, responses, mask)
    shifted = dataclasses.replace(laid_out, positions=laid_out.positions + 20)
    np.testing.assert_allclose(hidden_of(params, laid_out), hidden_of(params, shifted), **CLOSE)


def decoded(params, tokens, valid, responses, compute: ComputeConfig = COMPUTE) -> np.ndarray:
    """Hidden states of the responses' tokens [P, C, R, D], fed one at a time."""
    _, completions, length = responses.shape
    _, prefix = forward(params, rows.trunk(tokens, valid), cfg=CFG, compute=compute, keep_prefix=True)
    layers = transformer.decoding_layers(params, prefix, completions, cfg=CFG, compute=compute)
    suffix = transformer.empty_suffix(layers, completions, length)
    found = []
    for t in range(length):
        positions = jnp.broadcast_to(valid.sum(-1)[:, None] + t, responses.shape[:2])
        hidden, suffix = decode(
            params, layers, responses[..., t], positions, valid, suffix, jnp.array(t), cfg=CFG, compute=compute
        )
        found.append(np.asarray(hidden))
    return np.stack(found, axis=2)


@pytest.mark.parametrize(("way", "few"), [("scanned", 16), ("unrolled", 0), ("unrolled", 16)])
def test_cached_decoding_is_the_full_forward(params, way, few, monkeypatch):
    """Whether a token loop's weights lie as in training, or output by output for few rows."""
    monkeypatch.setattr(transformer, "FEW", few)
    tokens, valid, responses, _ = batch()
    everything = jnp.ones(responses.shape, bool)
    full = hidden_of(params, rows.branch(tokens, valid, responses, everything))
    own = full[:, SLOTS:].reshape(3, BRANCHES, TOKENS, -1)
    found = decoded(params, tokens, valid, responses, dataclasses.replace(COMPUTE, decode=way))
    np.testing.assert_allclose(found, own, **CLOSE)


def test_few_rows_are_those_of_a_device():
    """Of 32 rows a device of two copies of the model has 16; what splits a model splits no rows."""
    unrolled = dataclasses.replace(COMPUTE, decode="unrolled")
    assert transformer.are_few(16, unrolled)
    assert not transformer.are_few(17, unrolled)
    assert not transformer.are_few(16, COMPUTE)
    meshes = [make_mesh(*sizes, jax.devices()[:2]) for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]
    assert [transformer.are_few(32, dataclasses.replace(unrolled, mesh=mesh)) for mesh in meshes] == [
        True,
        False,
        False,
    ]


def test_branches_after_their_trunk_are_the_full_forward(params):
    tokens, valid, responses, mask = batch()
    laid_out = rows.branch(tokens, valid, responses, mask)
    _, prefix = forward(params, rows.trunk(tokens, valid), cfg=CFG, compute=COMPUTE, keep_prefix=True)
    after = jax.jit(transformer.forward_branches, static_argnames=("cfg", "compute"))
    found = after(params, laid_out, prefix, cfg=CFG, compute=COMPUTE)
    np.testing.assert_allclose(found, hidden_of(params, laid_out)[:, SLOTS:], **CLOSE)


def test_decoding_after_a_row_has_ended(params):
    """What is fed to a completion that has ended reaches neither its own earlier tokens nor any other completion."""
    tokens, valid, responses, mask = batch()
    first, second = (decoded(params, tokens, valid, responses.at[~mask].set(pad)) for pad in (0, 21))
    assert not mask.all()
    np.testing.assert_array_equal(first[mask], second[mask])
    own = hidden_of(params, rows.branch(tokens, valid, responses, mask))[:, SLOTS:].reshape(first.shape)
    np.testing.assert_allclose(first[mask], own[mask], **CLOSE)


def test_grouped_heads(params):
    """A key/value head for two query heads is two equal key/value heads with one each."""
    layers, groups = params["layers"], CFG.groups
    assert groups == 2
    q, kv = layers["qkv"][:, :, :, :groups], layers["qkv"][:, :, :, groups:]
    shape = (CFG.layers, CFG.width, CFG.heads, -1, CFG.head_dim)
    spread = layers | {
        "qkv": jnp.concatenate([q.reshape(shape), jnp.repeat(kv, groups, axis=2)], axis=3),
        "out": layers["out"].reshape(CFG.layers, CFG.heads, 1, CFG.head_dim, CFG.width),
    }
    laid_out = rows.branch(*batch())
    plain = dataclasses.replace(CFG, kv_heads=CFG.heads)
    np.testing.assert_allclose(
        hidden_of(params, laid_out), hidden_of(params | {"layers": spread}, laid_out, cfg=plain), **CLOSE
    )


@functools.partial(jax.jit, static_argnames="compute")
def value_and_gradient(params, laid_out: rows.Rows, *, compute: ComputeConfig):
    def value(params):
        hidden, _ = transformer.forward(params, laid_out, cfg=CFG, compute=compute)
        return jnp.sum(jnp.sin(hidden)), hidden

    return jax.value_and_grad(value, has_aux=True)(params)


WAYS = (ComputeConfig(remat="layer"), ComputeConfig(remat="dots"))


@pytest.mark.parametrize("compute", WAYS, ids=str)
def test_ways_to_compute_agree(params, compute):
    laid_out = rows.branch(*batch())
    plain, other = (value_and_gradient(params, laid_out, compute=way) for way in (COMPUTE, compute))
    # Gradients are sums over 39 columns of numbers of order 1.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4), plain, other)


def test_bfloat16_is_near(params):
    """8 bits of mantissa: eps is 4e-3, and a few roundings on the way add up."""
    laid_out = rows.branch(*batch())
    low = forward(params, laid_out, cfg=CFG, compute=ComputeConfig("bfloat16"))[0]
    assert low.dtype == jnp.bfloat16
    high = hidden_of(params, laid_out)
    assert np.abs(np.asarray(low, np.float32) - high)[laid_out.valid].max() < 0.05 * np.abs(high).max()
    assert logits(params, low[:, 0], cfg=CFG).dtype == jnp.float32


def loudest_padding(params) -> dict:
    """The embedding's padding rows hold numbers that would win any softmax."""
    return params | {"embedding": params["embedding"].at[CFG.vocab_size :].set(50.0)}


def test_padded_vocabulary_has_no_probability(params):
    assert CFG.padded_vocab_size == 64 > CFG.vocab_size
    hidden = jnp.ones((2, CFG.width))
    found = np.asarray(logits(loudest_padding(params), hidden, cfg=CFG))
    assert found[:, CFG.vocab_size :].max() < -1e20
    assert (np.asarray(jax.nn.softmax(found))[:, CFG.vocab_size :] == 0).all()
    np.testing.assert_allclose(
        found[:, : CFG.vocab_size], hidden @ params["embedding"][: CFG.vocab_size].T, rtol=1e-5, atol=1e-5
    )


@functools.partial(jax.jit, static_argnames="chunk")
def chunked(params, hidden, targets, upstream, *, chunk: int):
    """Log-probabilities, and the gradients of a weighted sum of them."""

    def total(params, hidden):
        found = heads.token_logprobs(params, hidden, targets, cfg=CFG, compute=ComputeConfig(head_chunk=chunk))
        return jnp.sum(found * upstream), found

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, hidden)
    return found, gradients


@jax.jit
def whole(params, hidden, targets, upstream):
    """The same by the textbook, with all logits at once."""

    def total(params, hidden):
        every = jax.nn.log_softmax(hidden @ params["embedding"][: CFG.vocab_size].T, axis=-1)
        found = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(found * upstream), found

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, hidden)
    return found, gradients


# 18 tokens: chunks that divide them, that don't, of one token, and larger than all.
@pytest.mark.parametrize("chunk", [1, 4, 9, 1000])
def test_chunked_log_probabilities(params, chunk):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(3, 6, CFG.width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, CFG.vocab_size, (3, 6)), jnp.int32)
    upstream = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    params = loudest_padding(params)
    expected = whole(params, hidden, targets, upstream)
    found = chunked(params, hidden, targets, upstream, chunk=chunk)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), found, expected)
    assert (found[0] <= 0).all()


def test_answer_logits_are_rows_of_the_logits(params):
    hidden = jnp.asarray(np.random.default_rng(4).normal(size=(5, CFG.width)), jnp.float32)
    found = heads.answer_logits(params, hidden, (7, 3), cfg=CFG)
    np.testing.assert_allclose(found, logits(params, hidden, cfg=CFG)[:, [7, 3]], **CLOSE)


def test_parameters():
    """Layers are stacked, and no two are alike."""
    params = fakes.make_params()
    assert set(params) == {"embedding", "layers", "final_norm"}
    assert params["embedding"].shape == (64, CFG.width)
    for leaf in jax.tree.leaves(params["layers"]):
        assert leaf.shape[0] == CFG.layers
    assert not np.array_equal(*params["layers"]["qkv"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="heads=4 is not a multiple of kv_heads=3"):
        dataclasses.replace(CFG, kv_heads=3)
