"""The fused step: the same numbers on every mesh and in any number of parts, and nothing moves that shouldn't."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fakes import COMPUTE, MODEL, Asked, left_padded, make_params, prompts_of, right_padded
from jax.sharding import Mesh

from oaif_jax import losses, step
from oaif_jax.annotate import orders
from oaif_jax.annotate.orders import Template
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Models
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.online import Online
from oaif_jax.methods.pairs import best_and_worst
from oaif_jax.models import lora, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.models.rows import trunk
from oaif_jax.rollout import Sampler, named_key, sample, score
from oaif_jax.step import Contribution, Step
from oaif_jax.types import Batch, Prompts, Rollout, Scores
from oaif_jax.update import state

ANNOTATOR = ModelConfig(vocab_size=47, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp=40)
ROWS, SLOTS, RESPONSE = 16, 7, 6
STOP = (1, 2, 5, 8, 9)  # several: random models stop now and then
SAMPLER = Sampler(temperature=0.9, top_k=0, top_p=1.0, max_tokens=RESPONSE, stop_ids=STOP, pad_id=0)
TEMPLATE = Template(first=(3, 4), second=(3, 6), closing=(7,), answers=(10, 11))
DPO = PairLoss("dpo", (("beta", 0.1),))
TX = optax.chain(optax.adamw(1e-2, weight_decay=0.1))
KEY = jax.random.key(11)
MESHES = {"one device": (1, 1, 1), "2x2x2": (2, 2, 2), "2x1x4": (2, 1, 4)}


MODELS = Models(MODEL, MODEL, COMPUTE)
ONLINE = Step(Online(DPO, "loses"), MODELS, SAMPLER, Asked(TEMPLATE, ANNOTATOR, STOP))
OFFLINE = Step(Offline(DPO), MODELS, SAMPLER)


def mesh_of(name: str) -> Mesh:
    shape = MESHES[name]
    return sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def models() -> tuple[dict, dict]:
    """A policy, and what is frozen: another model as the reference, so that the margins aren't all 0, and an annotator."""
    return make_params(MODEL, 0), {"reference": make_params(MODEL, 1), "annotator": make_params(ANNOTATOR, 2)}


def prompts(seed: int = 0) -> Batch:
    questions, question_valid = left_padded(seed + 100, ROWS, SLOTS + 4)
    batch = Batch(prompts_of(seed, ROWS, SLOTS), question={"questions": questions, "question_valid": question_valid})
    return jax.tree.map(np.asarray, batch)


def place(tree, mesh: Mesh):
    return sharding.place(tree, mesh, "float32")


@functools.cache
def online(mesh_name: str = "one device", parts: int = 1, **compute: Any) -> Contribution:
    """What the online step adds up, on the host."""
    mesh = mesh_of(mesh_name)
    params, frozen = models()
    take = dataclasses.replace(
        ONLINE, models=dataclasses.replace(MODELS, compute=dataclasses.replace(COMPUTE, mesh=mesh, **compute))
    )

    @jax.jit
    def contribute(params, frozen, batch):
        return step.add_up(lambda micro: step.contribution(params, frozen, micro, KEY, step=take), batch, parts)

    frozen = {name: place(tree, mesh) for name, tree in frozen.items()}
    return jax.device_get(contribute(place(params, mesh), frozen, sharding.place_batch(prompts(), mesh)))


def assert_gradients_close(got, want, rtol: float) -> None:
    """Element by element; below a hundred-thousandth of the leaf's largest gradient, float32 sums in another order differ
    by more than rtol of what is left after cancellation."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        assert scale > 0, path
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * scale, err_msg=str(path))


def p_orders(found: Contribution) -> np.ndarray:
    """P(the first is better) by each order, [ROWS, 2]."""
    return np.asarray(found.outputs["scores"].orders)[:, 0]


def assert_same_step(got: Contribution, want: Contribution) -> None:
    for name in ("tokens", "mask"):
        np.testing.assert_array_equal(got.outputs[name], want.outputs[name], err_msg=name)
    np.testing.assert_allclose(p_orders(got), p_orders(want), rtol=1e-5)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert got.weight == want.weight
    for name, sums in want.metrics.items():
        # A margin is what is left of four sums of log-probabilities: 1e-6 of 25 nats each, over 16 pairs.
        np.testing.assert_allclose(got.metrics[name], sums, rtol=1e-5, atol=1e-4, err_msg=name)
    assert_gradients_close(got.gradients, want.gradients, rtol=1e-5)


def test_the_pairs_are_worth_testing_with():
    """Both verdicts, both endings, several lengths: else the tests below would show little."""
    outputs, sums = online().outputs, online().metrics
    mask = outputs["mask"]
    finished = np.any(np.isin(outputs["tokens"], STOP) & mask, axis=-1)
    assert 0 < finished.mean() < 1
    assert len(set(mask.sum(-1).flat)) > 2
    assert np.any(finished[:, 0] != finished[:, 1])
    p_first = p_orders(online()).mean(-1)
    assert 0.2 < np.mean(p_first > 0.5) < 0.8
    assert np.abs(p_first - 0.5).min() > 1e-5  # no label hangs on rounding
    assert online().weight == ROWS
    assert sums["margin"][0] != 0
    assert sums["finished"][0] / sums["finished"][1] == pytest.approx(finished.mean())


# ------------------------------------------------------------------------------------------------ meshes and parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "with_lora"),
    [(COMPUTE, False), (dataclasses.replace(COMPUTE, remat="layer"), False), (COMPUTE, True)],
)
def test_prompts_encoded_once_give_what_encoding_them_twice_gives(compute, with_lora):
    """The fused step samples from the policy's pass over the prompts and takes the gradient back through it; taken apart,
    prompts are encoded to sample, and again to score."""
    params, frozen = models()
    if with_lora:
        frozen = {"base": params, "annotator": frozen["annotator"]}
        low = lora.init(jax.random.key(1), MODEL, 2, ("q", "v", "down"))
        params = {"lora": {name: each | {"b": each["b"] + 0.01} for name, each in low.items()}}
    take = dataclasses.replace(ONLINE, models=dataclasses.replace(MODELS, compute=compute))

    @jax.jit
    def apart(params, frozen, batch):
        drawn = step.rollout_of(params, frozen, batch, KEY, step=take)
        made = Batch(rollout=drawn, scores=take.annotator.score(frozen["annotator"], batch.question, drawn))
        return step.contribution(params, frozen, made, KEY, step=take)

    fused = jax.jit(functools.partial(step.contribution, step=take))
    assert_same_step(
        jax.device_get(fused(params, frozen, prompts(), KEY)), jax.device_get(apart(params, frozen, prompts()))
    )


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_whole_in_row_order(parts):
    assert_same_step(online(parts=parts), online())


@pytest.mark.slow
def test_parts_on_eight_devices():
    assert_same_step(online("2x2x2", 4), online())


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", MESHES)
def test_a_token_loop_layer_by_layer(mesh_name):
    """Where a mesh has two parts of the rows, each has few, and its weights lie output by output."""
    assert transformer.are_few(2 * ROWS, dataclasses.replace(COMPUTE, mesh=mesh_of("2x2x2"), decode="unrolled"))
    assert_same_step(online(mesh_name, decode="unrolled"), online())


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", ["2x2x2", "2x1x4"])
def test_tokens_along_tensor(mesh_name):
    """Rows of 19 columns, which `tensor` doesn't divide."""
    assert_same_step(online(mesh_name, remat="layer", sequence_parallel=True), online())


def test_what_is_kept_of_tokens_along_tensor():
    """A quarter of what the layers keep otherwise: 8 rows of 64 tokens, on two devices along fsdp and four along tensor."""
    mesh = sharding.make_mesh(1, 2, 4)
    cfg = dataclasses.replace(MODEL, layers=32, width=64)
    params = place(make_params(cfg, 0), mesh)
    rows = trunk(jnp.ones((8, 64), jnp.int32), jnp.ones((8, 64), bool))

    def taken(sequence_parallel: bool) -> int:
        compute = dataclasses.replace(COMPUTE, mesh=mesh, remat="layer", sequence_parallel=sequence_parallel)
        loss = lambda params: jnp.sum(transformer.forward(params, rows, cfg=cfg, compute=compute)[0] ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    kept = cfg.layers * (8 // 2) * 64 * cfg.width * 4
    assert taken(False) - taken(True) == pytest.approx(0.75 * kept, rel=0.15)


@pytest.mark.slow
def test_more_devices_than_key_value_heads():
    """Each of the four along `tensor` has both heads of the policy."""
    assert sharding.whole_heads(MODEL.kv_heads, mesh_of("2x1x4"))
    assert_same_step(online("2x1x4"), online())


@pytest.mark.slow
def test_columns_past_the_longest_response_change_nothing():
    """Responses of one token at the widths 2, 3 and 6 as at 6 alone; those that come back are as wide as ever."""
    params, frozen = models()
    stop = tuple(range(3, MODEL.vocab_size))
    short = dataclasses.replace(ONLINE, sampler=dataclasses.replace(SAMPLER, stop_ids=stop))

    def take(lengths: int) -> Contribution:
        contribute = functools.partial(step.contribution, step=dataclasses.replace(short, lengths=lengths))
        return jax.device_get(jax.jit(contribute)(params, frozen, prompts(), KEY))

    assert_same_step(take(3), take(1))


def test_the_narrowest_width_that_holds_all_responses():
    def width(cut: Rollout) -> Contribution:
        return Contribution({}, jnp.float32(cut.tokens.shape[-1]), jnp.float32(cut.mask.shape[-1]), {}, {})

    @jax.jit
    def chosen(longest) -> Contribution:
        lengths = jnp.array([[1, longest], [1, 1]])
        mask = jnp.arange(RESPONSE)[None, None] < lengths[..., None]
        asked = Prompts(jnp.ones((2, 1), jnp.int32), jnp.ones((2, 1), bool), jnp.arange(2))
        rollout = Rollout(asked, jnp.where(mask, 1, 0), mask, mask[..., 0], ("policy", "policy"))
        return step.at_length(width, rollout, 3)

    found = [chosen(longest) for longest in range(1, RESPONSE + 1)]
    assert [int(each.loss) for each in found] == [2, 2, 3, 6, 6, 6]
    assert all(each.weight == each.loss for each in found)


def test_tokens_belong_to_rows_not_to_places_in_the_batch():
    params, frozen = models()
    order = np.random.default_rng(0).permutation(ROWS)
    batch = jax.tree.map(lambda x: x[order], prompts())
    made = jax.jit(lambda batch: step.rollout_of(params, frozen, batch, KEY, step=ONLINE))(batch)
    np.testing.assert_array_equal(made.tokens, online().outputs["tokens"][order])


# ------------------------------------------------------------------------------------------------ what is differentiated


def finished_of(outputs: dict) -> np.ndarray:
    return np.any(np.isin(outputs["tokens"], STOP) & outputs["mask"], axis=-1)


def first_of(found: Contribution) -> np.ndarray:
    """Whether the first response is the chosen one, by the rule of missing ends and by the annotator."""
    finished = finished_of(found.outputs)
    return np.where(finished[:, 0] == finished[:, 1], p_orders(found).mean(-1) > 0.5, finished[:, 0])


def pairs_of(found: Contribution, first: np.ndarray | None = None) -> Batch:
    """The batch that the offline method takes, from what online collected."""
    first = first_of(found) if first is None else first
    outputs = found.outputs
    given = Rollout(prompts().prompts, outputs["tokens"], outputs["mask"], finished_of(outputs), ("data", "data"))
    value = np.stack([first, ~first], axis=-1).astype(np.float32)
    return Batch(given.prompts, data=given, scores=Scores(value, np.ones(value.shape, bool)))


def swapped(batch: Batch) -> Batch:
    """Each pair the other way around."""
    turned = {name: getattr(batch.data, name)[:, ::-1] for name in ("tokens", "mask", "finished")}
    scores = dataclasses.replace(batch.scores, value=batch.scores.value[:, ::-1])
    return dataclasses.replace(batch, data=dataclasses.replace(batch.data, **turned), scores=scores)


contribute_offline = jax.jit(functools.partial(step.contribution, step=OFFLINE))


def test_offline_on_the_collected_pairs_is_the_same_step():
    """So nothing of the gradient comes from sampling or annotating: offline sees tokens and labels only."""
    params, frozen = models()
    got = jax.device_get(contribute_offline(params, {"reference": frozen["reference"]}, pairs_of(online()), KEY))
    want = online()
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert_gradients_close(got.gradients, want.gradients, rtol=1e-5)
    for name, sums in got.metrics.items():
        np.testing.assert_allclose(sums, want.metrics[name], rtol=1e-5, atol=1e-4, err_msg=name)


def test_swapped_responses_with_the_other_label_are_the_same_pairs():
    params, frozen = models()
    batch = pairs_of(online())
    one, other = (
        contribute_offline(params, {"reference": frozen["reference"]}, each, KEY) for each in (batch, swapped(batch))
    )
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-6)
    assert_gradients_close(one.gradients, other.gradients, rtol=1e-5)


def test_reference_and_annotator_get_no_gradient():
    params, frozen = models()

    def loss(frozen, batch):
        return step.contribution(params, frozen, batch, KEY, step=ONLINE).loss

    gradients = jax.jit(jax.grad(loss))(frozen, prompts())
    assert jax.tree.structure(gradients) == jax.tree.structure(frozen)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(online().gradients))


def test_gradient_is_the_losses_slope():
    """A small step along the gradient changes the loss of the same pairs by its squared norm."""
    params, frozen = models()
    batch, gradients = pairs_of(online()), online().gradients
    squared = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(gradients))
    size = 1e-2 / squared**0.5  # far above float32's noise, small enough for the second order to be under a per cent
    up, down = (
        contribute_offline(jax.tree.map(lambda p, g, by=by: p + by * g, params, gradients), frozen, batch, KEY).loss
        for by in (size, -size)
    )
    rise = float(up) - float(down)
    assert rise == pytest.approx(2 * size * squared, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_is_its_reference_has_no_log_ratio(dtype, lengths):
    """Both go one way, so that they round alike: the margin and the estimate of KL are 0, whatever the type."""
    params, frozen = models()
    compute = dataclasses.replace(COMPUTE, dtype=dtype)
    take = dataclasses.replace(ONLINE, models=Models(MODEL, MODEL, compute), lengths=lengths)
    found = jax.jit(lambda p, f, b: step.contribution(p, f, b, KEY, step=take))(
        params, frozen | {"reference": params}, prompts()
    )
    for name in ("log_ratio", "margin"):
        assert found.metrics[name][0] == pytest.approx(0.0, abs=1e-6), name


def test_gradients_of_bfloat16_leaves_are_added_up_in_float32():
    params, frozen = models()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    add_up = jax.jit(
        lambda p, b: step.add_up(lambda micro: step.contribution(p, frozen, micro, KEY, step=ONLINE), b, 4)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(add_up, low, prompts()).gradients)} == {
        jnp.dtype("float32")
    }


# ------------------------------------------------------------------------------------------------ labels


def labels(said, finished, missing_eos: str, identical=False) -> tuple[bool, float]:
    """Whether the first of two responses is chosen, and the pair's weight."""
    tokens = jnp.ones((1, 2, 3), jnp.int32) if identical else jnp.arange(6, dtype=jnp.int32).reshape(1, 2, 3)
    asked = Prompts(jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), bool), jnp.arange(1))
    rollout = Rollout(asked, tokens, jnp.ones((1, 2, 3), bool), jnp.array([finished]), ("policy", "policy"))
    pairs = best_and_worst(rollout, orders.scores(jnp.array([[said]], jnp.float32), 2), missing_eos=missing_eos)
    assert int(pairs.rejected[0]) == 1 - int(pairs.chosen[0])
    return bool(pairs.chosen[0] == 0), float(pairs.weight[0])


@pytest.mark.parametrize("missing_eos", ["loses", "ignore"])
def test_labels_where_both_or_none_finished(missing_eos):
    for finished in ([True, True], [False, False]):
        assert labels([0.9, 0.2], finished, missing_eos) == (True, 1.0)
        assert labels([0.1, 0.8], finished, missing_eos) == (False, 1.0)
        assert labels([0.25, 0.75], finished, missing_eos)[1] == 0.0, "exactly 1/2 abstains"
        assert labels([0.9, 0.9], finished, missing_eos, identical=True)[1] == 0.0


def test_no_number_is_no_label():
    """But a missing end still loses."""
    for p_orders in ([np.nan, 0.9], [np.nan, np.nan]):
        assert labels(p_orders, [True, True], "loses")[1] == 0.0
        assert labels(p_orders, [False, True], "ignore")[1] == 0.0
        assert labels(p_orders, [False, True], "loses") == (False, 1.0)


def test_a_missing_end_loses_whatever_the_annotator_says():
    for p_orders in ([0.99, 0.99], [0.01, 0.01], [0.5, 0.5]):
        assert labels(p_orders, [True, False], "loses") == (True, 1.0)
        assert labels(p_orders, [False, True], "loses") == (False, 1.0)
    assert labels([0.01, 0.01], [True, False], "ignore") == (False, 1.0)
    assert labels([0.99, 0.99], [False, True], "ignore") == (True, 1.0)
    assert labels([0.5, 0.5], [True, False], "ignore")[1] == 0.0


@pytest.mark.parametrize("missing_eos", ["loses", "ignore"])
def test_a_missing_end_in_the_fused_step(missing_eos):
    params, frozen = models()
    take = dataclasses.replace(ONLINE, method=Online(DPO, missing_eos))

    @jax.jit
    def collect(batch):
        drawn = step.rollout_of(params, frozen, batch, KEY, step=take)
        scores = take.annotator.score(frozen["annotator"], batch.question, drawn)
        return drawn, scores, *take.method.target(batch, drawn, scores)

    drawn, scores, pairs, sums = jax.device_get(collect(prompts(seed=2)))
    finished = np.any(np.isin(drawn.tokens, STOP) & drawn.mask, axis=-1)
    np.testing.assert_array_equal(drawn.finished, finished)
    differs, says_first = finished[:, 0] != finished[:, 1], scores.orders[:, 0].mean(-1) > 0.5
    assert np.any(differs & (finished[:, 0] != says_first)), "no pair where the rule decides"
    want = np.where(differs, finished[:, 0], says_first) if missing_eos == "loses" else says_first
    np.testing.assert_array_equal(pairs.chosen == 0, want)
    assert pairs.weight.sum() == ROWS
    assert sums["abstained"][0] == 0


# ------------------------------------------------------------------------------------------------ the whole step


def train_step(taken: Step, mesh: Mesh, parts: int = 1):
    """As train.run compiles it."""
    return jax.jit(
        functools.partial(step.train_step, step=dataclasses.replace(taken, parts=parts), tx=TX),
        donate_argnames="state",
        out_shardings=(state.state_shardings(models()[0], TX, mesh), None, None),
    )


def begin(mesh: Mesh, params=None) -> state.TrainState:
    return state.create(models()[0] if params is None else params, TX, mesh)


@pytest.mark.parametrize(("mesh_name", "parts"), [("one device", 2), pytest.param("2x2x2", 1, marks=pytest.mark.slow)])
def test_one_trace_in_three_steps_and_donation(mesh_name, parts):
    mesh = mesh_of(mesh_name)
    traced = []

    class Counted(Online):
        def loss(self, predicted, target):
            traced.append(1)
            return super().loss(predicted, target)

    counted = dataclasses.replace(ONLINE, method=Counted(DPO, "loses"))
    take, training = train_step(counted, mesh, parts), begin(mesh)
    frozen = {name: place(tree, mesh) for name, tree in models()[1].items()}
    drawn, after_one = [], None
    for number in range(3):
        old = training
        training, metrics, outputs = take(old, frozen, sharding.place_batch(prompts(number), mesh), KEY)
        drawn.append(np.asarray(outputs["tokens"]))
        after_one = after_one or len(traced)
        large = jax.tree.leaves((old.params, old.optimizer))  # jax 0.11 keeps the step's number, which was read here
        assert all(leaf.is_deleted() for leaf in large), "the old state's buffers are kept"
        assert int(training.step) == number + 1
        assert np.isfinite(float(metrics["loss"]))
        assert float(metrics["changed"]) > 0.9
    assert len(traced) == after_one <= 1 + (parts > 1)  # with parts once more for the shapes
    assert take._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    want = state.state_shardings(training.params, TX, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, on: x.sharding.is_equivalent_to(on, x.ndim), training, want))
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.slow
def test_each_step_draws_anew():
    """The same prompts at the next step meet other random numbers."""
    mesh = mesh_of("one device")
    take, frozen = train_step(ONLINE, mesh), models()[1]
    drawn = []
    for number in (0, 0, 1):
        start = dataclasses.replace(begin(mesh), step=jnp.array(number, jnp.int32))
        _, _, outputs = take(start, frozen, sharding.place_batch(prompts(), mesh), KEY)
        drawn.append(np.asarray(outputs["tokens"]))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.slow
@pytest.mark.parametrize("why", ["identical", "undecided"])
def test_nothing_moves_where_every_pair_abstains(why):
    """Neither parameters (by weight decay) nor moments (by their decay); the step counts."""
    mesh = mesh_of("one device")
    params, frozen = models()
    take = train_step(dataclasses.replace(ONLINE, method=Online(DPO, "ignore")), mesh, parts=2)
    batch = sharding.place_batch(prompts(seed=3), mesh)
    if why == "identical":
        params = params | {"embedding": 1e4 * params["embedding"]}  # one token takes all of the probability
    first, _, _ = take(begin(mesh, params), frozen, batch, KEY)
    if why == "undecided":
        assert any(np.any(leaf) for leaf in jax.tree.leaves(first.optimizer)), "no moments to keep"
        frozen = frozen | {"annotator": jax.tree.map(jnp.zeros_like, frozen["annotator"])}  # says 1/2 to everything
    before = jax.device_get((first.params, first.optimizer))
    second, metrics, outputs = take(first, frozen, batch, KEY)
    assert float(metrics["loss"]) == float(metrics["weight"]) == float(metrics["grad_norm"]) == 0.0
    named = {"identical": "identical", "undecided": "abstained"}[why]
    assert float(metrics[named]) == 1.0
    same = np.all((outputs["tokens"][:, 0] == outputs["tokens"][:, 1]) | ~outputs["mask"][:, 0])
    assert bool(same) == (why == "identical")
    assert int(second.step) == 2
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.array_equal(a, b), jax.device_get((second.params, second.optimizer)), before)
    )


def unlabelled(batch: Batch, rows: np.ndarray) -> Batch:
    """The same pairs, of which some aren't known."""
    known = np.ones(batch.scores.value.shape, bool)
    known[rows] = False
    return dataclasses.replace(batch, scores=dataclasses.replace(batch.scores, known=known))


def test_loss_is_divided_by_the_weight_of_all_parts():
    """A mean over pairs that count, not a mean of the parts' means; pairs that don't count change nothing."""
    params, frozen = models()
    kept = np.array([0, 2, 4, 6, 8, 3])  # five rows of one part of two, one of the other
    batch, first = pairs_of(online()), first_of(online())
    mesh = mesh_of("one device")
    take = train_step(OFFLINE, mesh, parts=2)
    rest = np.setdiff1d(np.arange(ROWS), kept)
    _, whole, _ = take(begin(mesh, params), frozen, unlabelled(batch, rest), KEY)
    margins = log_ratios(params, frozen["reference"], batch.data)
    chosen, rows = np.where(first, 0, 1), np.arange(ROWS)
    margin = (margins[rows, chosen] - margins[rows, 1 - chosen])[kept]
    assert float(whole["weight"]) == len(kept)
    assert float(whole["loss"]) == pytest.approx(np.mean(np.logaddexp(0, -0.1 * margin)), rel=1e-5)
    assert float(whole["margin"]) == pytest.approx(margin.mean(), rel=1e-4)
    assert float(whole["accuracy"]) == pytest.approx(np.mean(margin > 0))


def log_ratios(params, reference, rollout: Rollout) -> np.ndarray:
    of = jax.jit(lambda p: score(p, jax.tree.map(jnp.asarray, rollout), cfg=MODEL, compute=COMPUTE).sum(-1))
    return np.asarray(of(params)) - np.asarray(of(reference))


def test_a_pair_without_weight_poisons_nothing():
    """Its loss may be infinite: neither the sum nor the gradients notice."""
    params, frozen = models()
    tokens, mask = right_padded(3, (ROWS, 2, RESPONSE))
    tokens = np.array(tokens)
    tokens[0, 0, 0] = MODEL.vocab_size + 1  # an id that the policy gives no probability, and the reference does
    shapes = Models(MODEL, dataclasses.replace(MODEL, vocab_size=64), COMPUTE)
    squared = Step(Offline(PairLoss("ipo", (("beta", 0.1),))), shapes, SAMPLER)
    batch = pairs_of(online(), np.ones(ROWS, bool))
    batch = dataclasses.replace(batch, data=dataclasses.replace(batch.data, tokens=tokens, mask=np.asarray(mask)))
    contribute = jax.jit(functools.partial(step.contribution, params, frozen, key=KEY, step=squared))
    assert not np.isfinite(contribute(batch).loss)
    without = contribute(unlabelled(batch, np.array([0])))
    assert np.isfinite(without.loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(without.gradients))
    assert without.weight == ROWS - 1


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(name, marks=() if name in ("dpo", "slic") else pytest.mark.slow)
        for name in sorted({*losses.LOSSES} - {*losses.WITHOUT_REFERENCE})
    ],
)
def test_policy_equal_to_the_reference_has_the_losses_value_at_zero(loss):
    params, _ = models()
    numbers = {"beta": 0.1, "length_alpha": 0.0}
    numbers = tuple((name, numbers[name]) for name in losses.numbers_of(loss))
    take = dataclasses.replace(OFFLINE, method=Offline(PairLoss(loss, numbers)))
    found = jax.jit(functools.partial(step.contribution, step=take))(
        params, {"reference": params}, pairs_of(online()), KEY
    )
    want = {"ipo": 25.0, "ipo_mean": 25.0, "slic": 1.0}.get(loss, np.log(2))  # (1 / 0.2)^2
    assert float(found.loss) / ROWS == pytest.approx(want, rel=1e-5)
    assert float(found.metrics["log_ratio"][0]) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
def test_completions_by_policy_reference_and_data_side_by_side():
    """Each writer's own model and key; the policy's are those of the step that samples from it alone."""
    params, frozen = models()
    given = pairs_of(online()).data

    class Three(Online):
        by = ("policy", "reference", "data", "data")

    batch = dataclasses.replace(prompts(), data=given)
    take = dataclasses.replace(ONLINE, method=Three(DPO, "loses"))
    made = jax.jit(lambda batch: step.rollout_of(params, frozen, batch, KEY, step=take))(batch)
    assert made.by == Three.by
    assert made.tokens.shape == (ROWS, 4, RESPONSE)
    np.testing.assert_array_equal(made.tokens[:, 0], online().outputs["tokens"][:, 0])
    np.testing.assert_array_equal(made.tokens[:, 2:], given.tokens)
    theirs = sample(
        frozen["reference"], jax.tree.map(jnp.asarray, batch.prompts), named_key(KEY, "sample.reference"),
        sampler=SAMPLER, completions=1, cfg=MODEL, compute=COMPUTE,
    )  # fmt: skip
    np.testing.assert_array_equal(made.tokens[:, 1], theirs.tokens[:, 0])


def test_the_reference_is_its_own_the_base_or_the_base_with_additions():
    own, base, low = {"embedding": 1}, {"embedding": 2}, {"lora": 3}
    assert step.reference_of({"reference": own, "base": base}) == own
    assert step.reference_of({"base": base}) == base
    assert step.reference_of({"reference": low, "base": base}) == {"embedding": 2, "lora": 3}
    assert step.policy_of(low, {"base": base}) == {"embedding": 2, "lora": 3}
