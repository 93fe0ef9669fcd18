"""SELM's and XPO's steps: their pairs, the bonus' sign and constants, and DPO where there is no bonus."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import COMPUTE, MODEL
from test_step import DPO, KEY, ONLINE, RESPONSE, ROWS, SAMPLER, models, prompts

from oaif_jax import config, step
from oaif_jax.base.errors import UserError
from oaif_jax.losses import PairLoss
from oaif_jax.methods import METHODS
from oaif_jax.methods.base import Models
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.pairs import Pairs, preference_of
from oaif_jax.methods.selm import SELM
from oaif_jax.methods.xpo import XPO
from oaif_jax.rollout import named_key, sample
from oaif_jax.step import Step
from oaif_jax.tiny import data as tiny
from oaif_jax.types import DATA, Batch, Logps, Rollout, Scores

BETA = 0.1


def selm(alpha: float, ranked: int = 3) -> SELM:
    return SELM(DPO, alpha, ranked, 0, "ignore")


def given() -> Batch:
    """Prompts with two completions of the data."""
    rng = np.random.default_rng(5)
    mask = np.arange(RESPONSE) < rng.integers(1, RESPONSE + 1, (ROWS, 2, 1))
    tokens = np.where(mask, rng.integers(12, 40, mask.shape), 0).astype(np.int32)
    batch = prompts()
    data = Rollout(batch.prompts, tokens, mask, np.ones((ROWS, 2), bool), (DATA, DATA))
    return dataclasses.replace(batch, data=data)


@pytest.mark.parametrize("alpha", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_step_is_that_of_dpo_on_its_best_and_worst_and_a_bonus(alpha):
    """Sampled, ranked and updated in one program: the gradient is offline DPO's on the pairs that were chosen, plus alpha beta
    that of log pi(y_own)."""
    params, frozen = models()
    take = dataclasses.replace(ONLINE, method=selm(alpha))
    found = jax.jit(lambda batch: step.contribution(params, frozen, batch, KEY, step=take))(given())
    outputs = jax.device_get(found.outputs)
    assert outputs["tokens"].shape == (ROWS, 3, RESPONSE)
    np.testing.assert_array_equal(outputs["tokens"][:, 1:], given().data.tokens)
    value = outputs["scores"].value
    best, worst = value.argmax(-1), value.argmin(-1)
    assert {0, 1, 2} == set(best)  # the own one is chosen, and isn't
    pick = lambda x: np.stack([x[np.arange(ROWS), each] for each in (best, worst)], axis=1)  # noqa: E731
    pairs = Rollout(
        given().prompts, pick(outputs["tokens"]), pick(outputs["mask"]), np.ones((ROWS, 2), bool), (DATA, DATA)
    )
    scores = Scores(np.tile(np.float32([1, 0]), (ROWS, 1)), np.ones((ROWS, 2), bool))
    offline = Step(Offline(DPO), ONLINE.models, SAMPLER)
    frozen_now = {"reference": frozen["reference"]}
    of_pairs = jax.jit(lambda batch: step.contribution(params, frozen_now, batch, KEY, step=offline))(
        Batch(given().prompts, data=pairs, scores=scores)
    )
    own = Rollout(given().prompts, outputs["tokens"][:, :1], outputs["mask"][:, :1], np.ones((ROWS, 1), bool), (DATA,))
    sft = Step(METHODS["sft"](), ONLINE.models, SAMPLER)
    of_own = jax.jit(lambda batch: step.contribution(params, {}, batch, KEY, step=sft))(
        Batch(given().prompts, data=own)
    )  # of -log pi(y_own)
    assert found.weight == of_pairs.weight == ROWS
    for name in ("margin", "accuracy"):
        np.testing.assert_allclose(found.metrics[name], of_pairs.metrics[name], rtol=1e-4, err_msg=name)
    for (path, got), pair, bonus in zip(
        jax.tree_util.tree_leaves_with_path(found.gradients),
        jax.tree.leaves(of_pairs.gradients),
        jax.tree.leaves(of_own.gradients),
        strict=True,
    ):
        wanted = pair - alpha * BETA * bonus
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max(), err_msg=str(path))


def test_the_own_response_is_the_references_and_greedy_where_that_is_asked_for():
    params, frozen = models()
    greedy = dataclasses.replace(SAMPLER, temperature=0.0)
    take = dataclasses.replace(ONLINE, method=selm(0.1, ranked=2), reference_sampler=greedy)
    made = jax.jit(lambda batch: step.rollout_of(params, frozen, batch, KEY, step=take))(given())
    assert made.by == ("reference", "data")
    theirs = sample(
        frozen["reference"], jax.tree.map(jnp.asarray, given().prompts), named_key(KEY, "any"),
        sampler=greedy, completions=1, cfg=MODEL, compute=COMPUTE,
    )  # fmt: skip
    np.testing.assert_array_equal(made.tokens[:, 0], theirs.tokens[:, 0])
    np.testing.assert_array_equal(made.tokens[:, 1], given().data.tokens[:, 0])  # the chosen one


LOGPS = Logps(
    policy=jnp.array([[[-1.0, -2.0], [-0.5, -0.5], [-3.0, 0.0]]]),
    reference=jnp.array([[[-1.5, -0.5], [-1.0, -1.0], [-2.0, 0.0]]]),
    mask=jnp.array([[[True, True], [True, True], [True, False]]]),
)
ALL = Pairs(jnp.array([1]), jnp.array([2]), jnp.ones(1))


def test_selms_constants():
    """h = 1 - (-1) = 2; the bonus is alpha beta (-3 - -2) = -alpha beta."""
    loss = SELM(PairLoss("dpo", (("beta", 0.5),)), 0.2, 3, 0, "ignore").loss(LOGPS, ALL)
    np.testing.assert_allclose(loss.total, np.log1p(np.exp(-1.0)) - 0.2 * 0.5, rtol=1e-6)


def test_xpos_constants():
    """h = (-3 + 2) - (-1 + 2) = -2 for completion 0 over 1; the bonus is alpha log pi(y~) = alpha (-1), without beta."""
    two = Logps(LOGPS.policy[:, :2], LOGPS.reference[:, :2], LOGPS.mask[:, :2])
    pairs = Pairs(jnp.array([0]), jnp.array([1]), jnp.ones(1))
    loss = XPO(PairLoss("dpo", (("beta", 0.5),)), 0.2, "ignore").loss(two, pairs)
    np.testing.assert_allclose(loss.total, np.log1p(np.exp(1.0)) - 0.2, rtol=1e-6)


@pytest.mark.parametrize(("method", "at"), [(selm(0.3), 0), (XPO(DPO, 0.3, "ignore"), 1)], ids=["selm", "xpo"])
def test_the_bonus_lowers_what_the_reference_wrote(method, at):
    """Descent on the loss: d loss / d log pi of the reference's response is larger by the bonus' weight, whatever else is
    preferred, also where that response was chosen."""
    slope = lambda method: jax.grad(  # noqa: E731
        lambda policy: method.loss(dataclasses.replace(LOGPS, policy=policy), ALL).total
    )(LOGPS.policy)
    plain = dataclasses.replace(method, alpha=0.0)
    more = slope(method) - slope(plain)
    weight = 0.3 * BETA if isinstance(method, SELM) else 0.3
    np.testing.assert_allclose(more[0, at], weight, rtol=1e-5)
    np.testing.assert_allclose(np.delete(more[0], at, axis=0), 0.0)


def test_a_prompt_whose_responses_score_the_same_has_no_weight():
    """Neither pair nor bonus."""
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(1, 3, 2)
    rollout = Rollout(given().prompts, tokens, jnp.ones((1, 3, 2), bool), jnp.ones((1, 3), bool), SELM.by)
    pairs, _ = selm(0.3).target(Batch(), rollout, Scores(jnp.full((1, 3), 0.5), jnp.ones((1, 3), bool)))
    loss = selm(0.3).loss(LOGPS, pairs)
    assert float(loss.total) == float(loss.weight) == 0.0


def test_soft_labels_are_the_annotators_of_that_very_pair():
    orders = jnp.array([[[0.9, 0.7], [0.2, 0.4], [0.1, 0.1]]])  # of (0, 1), (0, 2), (1, 2)
    scores = Scores(jnp.zeros((1, 3)), jnp.ones((1, 3), bool), orders)
    for (chosen, rejected), p in {(0, 1): 0.8, (1, 0): 0.2, (2, 0): 0.7, (1, 2): 0.1}.items():
        pairs = Pairs(jnp.array([chosen]), jnp.array([rejected]), jnp.ones(1))
        np.testing.assert_allclose(preference_of(scores, pairs), [p], rtol=1e-6)
    alone = Scores(jnp.array([[2.0, 0.5]]), jnp.ones((1, 2), bool))
    pairs = Pairs(jnp.array([0]), jnp.array([1]), jnp.ones(1))
    np.testing.assert_allclose(preference_of(alone, pairs), 1 / (1 + np.exp(-1.5)), rtol=1e-6)


def test_alpha_belongs_to_those_that_take_it():
    data = tiny.dataset("prompts", seed=0, train_posts=8, prompt_tokens=56, response_tokens=16)
    cfg = config.parse({"loss": {"alpha": 0.1}, "method": "online"})
    with pytest.raises(UserError, match=r"config.loss.alpha=0.1: the loss dpo doesn't take it"):
        METHODS["online"].of(cfg, data)
    for name in ("selm", "xpo"):
        assert METHODS[name].of(dataclasses.replace(cfg, method=name), data).alpha == 0.1  # type: ignore[attr-defined]


@pytest.mark.slow
def test_shapes_of_both_steps_on_a_mesh_and_in_parts():
    """XPO in two parts is XPO in one."""
    params, frozen = models()
    take = Step(XPO(DPO, 0.1, "loses"), Models(MODEL, MODEL, COMPUTE), SAMPLER, ONLINE.annotator)
    whole, parts = (
        jax.jit(
            lambda batch, n=n: step.add_up(
                lambda micro: step.contribution(params, frozen, micro, KEY, step=take), batch, n
            )
        )(prompts())
        for n in (1, 2)
    )
    np.testing.assert_array_equal(whole.outputs["tokens"], parts.outputs["tokens"])
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-5)
    assert whole.outputs["tokens"].shape == (ROWS, 2, RESPONSE)


@pytest.mark.parametrize("method", [SELM, XPO])
def test_a_loss_without_a_reference_reads_none_beside_a_bonus_that_does(method):
    """SimPO's part is of log-probabilities, though the reference's are there: by hand, means over two tokens and one."""
    loss = PairLoss("simpo", (("beta", 2.0), ("gamma", 0.5)))
    made = SELM(loss, 0.0, 3, 0, "ignore") if method is SELM else XPO(loss, 0.0, "ignore")
    # (-0.5 - 0.5) / 2 - (-3.0) / 1 = 2.5
    np.testing.assert_allclose(made.loss(LOGPS, ALL).total, np.log1p(np.exp(-(2.0 * 2.5 - 0.5))), rtol=1e-5)


@pytest.mark.parametrize("method", [SELM, XPO])
def test_soft_labels_reach_every_method_that_asks(method):
    loss = PairLoss("dpo", (("beta", 0.5),), "soft")
    made = SELM(loss, 0.0, 3, 0, "ignore") if method is SELM else XPO(loss, 0.0, "ignore")
    completions = len(made.writers)
    tokens = jnp.arange(2 * completions, dtype=jnp.int32).reshape(1, completions, 2)
    rollout = Rollout(
        given().prompts, tokens, jnp.ones(tokens.shape, bool), jnp.ones((1, completions), bool), made.writers
    )
    orders = jnp.array([[[0.9, 0.7], [0.9, 0.9], [0.6, 0.6]][: completions * (completions - 1) // 2]])
    value = jnp.array([[0.85, 0.4, 0.25][:completions]])
    pairs, _ = made.target(Batch(), rollout, Scores(value, jnp.ones(value.shape, bool), orders))
    np.testing.assert_allclose(pairs.preference, [0.9 if completions == 3 else 0.8], rtol=1e-6)
