"""The fused step: the same numbers on every mesh and in any number of parts, and nothing moves that shouldn't."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fakes import COMPUTE, MODEL, left_padded, make_params, right_padded
from jax.sharding import Mesh

from oaif_jax import losses, step
from oaif_jax.annotate.llm import Template
from oaif_jax.models import lora, sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.sample import Responses, Sampler
from oaif_jax.tasks.base import place as place_batch
from oaif_jax.update import state

ANNOTATOR = ModelConfig(vocab_size=47, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp=40)
ROWS, SLOTS, RESPONSE = 16, 7, 6
STOP = (1, 2, 5, 8, 9)  # several: random models stop now and then
SAMPLER = Sampler(temperature=0.9, top_k=0, top_p=1.0, max_tokens=RESPONSE, stop_ids=STOP, pad_id=0)
TEMPLATE = Template(first=(3, 4), second=(3, 6), closing=(7,), answers=(10, 11))
PAIR = step.PairObjective("dpo", 0.1, MODEL, MODEL, COMPUTE)
ONLINE = step.OnlineObjective(PAIR, SAMPLER, ANNOTATOR, TEMPLATE, missing_eos="loses")
TX = optax.chain(optax.adamw(1e-2, weight_decay=0.1))
KEY = jax.random.key(11)
MESHES = {"one device": (1, 1, 1), "2x2x2": (2, 2, 2)}


def mesh_of(name: str) -> Mesh:
    shape = MESHES[name]
    return sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def models() -> tuple[dict, dict]:
    """A policy, and what is frozen: another model as the reference, so that the margins aren't all 0, and an annotator."""
    return make_params(MODEL, 0), {"reference": make_params(MODEL, 1), "annotator": make_params(ANNOTATOR, 2)}


def prompts(seed: int = 0) -> dict[str, np.ndarray]:
    tokens, valid = left_padded(seed, ROWS, SLOTS)
    questions, question_valid = left_padded(seed + 100, ROWS, SLOTS + 4)
    batch = {"prompts": tokens, "prompt_valid": valid, "questions": questions, "question_valid": question_valid}
    return jax.tree.map(np.asarray, batch) | {"rows": np.arange(ROWS, dtype=np.int32)}


def place(tree, mesh: Mesh):
    return state.place(tree, mesh, "float32")


@functools.cache
def online(mesh_name: str = "one device", parts: int = 1) -> step.Contribution:
    """What the online step adds up, on the host."""
    mesh = mesh_of(mesh_name)
    params, frozen = models()

    compute = dataclasses.replace(COMPUTE, mesh=mesh)

    @jax.jit
    def contribute(params, frozen, batch):
        pair = dataclasses.replace(PAIR, compute=compute)
        objective = functools.partial(step.online, objective=dataclasses.replace(ONLINE, pair=pair))
        return step.add_up(lambda micro: objective(params, frozen, micro, KEY), batch, parts)

    frozen = {name: place(tree, mesh) for name, tree in frozen.items()}
    return jax.device_get(contribute(place(params, mesh), frozen, place_batch(prompts(), mesh)))


def assert_gradients_close(got, want, rtol: float) -> None:
    """Element by element; below a hundred-thousandth of the leaf's largest gradient, float32 sums in another order differ
    by more than rtol of what is left after cancellation."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        assert scale > 0, path
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * scale, err_msg=str(path))


def assert_same_step(got: step.Contribution, want: step.Contribution) -> None:
    for name in ("responses", "mask", "identical"):
        np.testing.assert_array_equal(got.outputs[name], want.outputs[name], err_msg=name)
    np.testing.assert_allclose(got.outputs["p_orders"], want.outputs["p_orders"], rtol=1e-5)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert got.weight == want.weight
    for name, sums in want.sums.items():
        # A margin is what is left of four sums of log-probabilities: 1e-6 of 25 nats each, over 16 pairs.
        np.testing.assert_allclose(got.sums[name], sums, rtol=1e-5, atol=1e-4, err_msg=name)
    assert_gradients_close(got.gradients, want.gradients, rtol=1e-5)


def test_the_pairs_are_worth_testing_with():
    """Both verdicts, both endings, several lengths: else the tests below would show little."""
    outputs, sums = online().outputs, online().sums
    mask = outputs["mask"]
    finished = np.any(np.isin(outputs["responses"], STOP) & mask, axis=-1)
    assert 0 < finished.mean() < 1
    assert len(set(mask.sum(-1).flat)) > 2
    assert np.any(finished[:, 0] != finished[:, 1])
    p_first = outputs["p_orders"].mean(-1)
    assert 0.2 < np.mean(p_first > 0.5) < 0.8
    assert np.abs(p_first - 0.5).min() > 1e-5  # no label hangs on rounding
    assert online().weight == ROWS
    assert sums["margin"][0] != 0
    assert sums["finished"][0] / sums["finished"][1] == pytest.approx(finished.mean())


# ------------------------------------------------------------------------------------------------ meshes and parts


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
    objective = dataclasses.replace(ONLINE, pair=dataclasses.replace(PAIR, compute=compute))

    @jax.jit
    def apart(params, frozen, batch):
        drawn = step.draw(step.policy_of(params, frozen), batch, KEY, online=objective)
        made = {"responses": drawn.tokens, "mask": drawn.mask, "finished": drawn.finished}
        made["p_orders"] = step.ask(frozen, batch, drawn, online=objective)
        return step.annotated(params, frozen, batch | made, KEY, objective=objective)

    fused = jax.jit(functools.partial(step.online, objective=objective))
    assert_same_step(
        jax.device_get(fused(params, frozen, prompts(), KEY)), jax.device_get(apart(params, frozen, prompts()))
    )


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_whole_in_row_order(parts):
    assert_same_step(online(parts=parts), online())


def test_parts_on_eight_devices():
    assert_same_step(online("2x2x2", 4), online())


def test_columns_past_the_longest_response_change_nothing():
    """Responses of one token at the widths 2, 3 and 6 as at 6 alone; those that come back are as wide as ever."""
    params, frozen = models()
    stop = tuple(range(3, MODEL.vocab_size))
    objective = dataclasses.replace(ONLINE, sampler=dataclasses.replace(ONLINE.sampler, stop_ids=stop))

    def take(lengths: int) -> step.Contribution:
        contribute = functools.partial(step.online, objective=dataclasses.replace(objective, lengths=lengths))
        return jax.device_get(jax.jit(contribute)(params, frozen, prompts(), KEY))

    assert_same_step(take(3), take(1))


def test_the_narrowest_width_that_holds_all_responses():
    def width(cut) -> step.Contribution:
        return step.Contribution({}, jnp.float32(cut.tokens.shape[-1]), jnp.float32(cut.mask.shape[-1]), {}, {})

    @jax.jit
    def chosen(steps) -> step.Contribution:
        tokens = jnp.zeros((2, 2, RESPONSE), jnp.int32)
        responses = Responses(tokens, tokens > 0, tokens[..., 0] > 0, steps)
        return step.at_length(width, responses, 3)

    found = [chosen(jnp.array(steps)) for steps in range(1, RESPONSE + 1)]
    assert [int(each.loss) for each in found] == [2, 2, 3, 6, 6, 6]
    assert all(each.weight == each.loss for each in found)


def test_tokens_belong_to_rows_not_to_places_in_the_batch():
    params, _ = models()
    order = np.random.default_rng(0).permutation(ROWS)
    batch = {name: x[order] for name, x in prompts().items()}
    made = jax.jit(lambda *args: step.draw(*args, online=ONLINE))(params, batch, KEY)
    np.testing.assert_array_equal(made.tokens, online().outputs["responses"][order])


# ------------------------------------------------------------------------------------------------ what is differentiated


def pairs_of(outputs: dict) -> dict[str, np.ndarray]:
    """The batch that the offline objective takes, from what online collected."""
    finished = np.any(np.isin(outputs["responses"], STOP) & outputs["mask"], axis=-1)
    first = outputs["p_orders"].mean(-1) > 0.5
    first = np.where(finished[:, 0] == finished[:, 1], first, finished[:, 0])
    batch = {name: x for name, x in prompts().items() if name.startswith("prompt")}
    return batch | {"responses": outputs["responses"], "mask": outputs["mask"], "first_is_better": first}


def test_offline_on_the_collected_pairs_is_the_same_step():
    """So nothing of the gradient comes from sampling or annotating: offline sees tokens and labels only."""
    params, frozen = models()
    offline = jax.jit(functools.partial(step.offline, objective=PAIR))
    got = jax.device_get(offline(params, {"reference": frozen["reference"]}, pairs_of(online().outputs), KEY))
    want = online()
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert_gradients_close(got.gradients, want.gradients, rtol=1e-5)
    for name, sums in got.sums.items():
        np.testing.assert_allclose(sums, want.sums[name], rtol=1e-5, atol=1e-4, err_msg=name)


def test_swapped_responses_with_the_other_label_are_the_same_pairs():
    params, frozen = models()
    offline = jax.jit(functools.partial(step.offline, objective=PAIR))
    batch = pairs_of(online().outputs)
    swapped = batch | {name: batch[name][:, ::-1] for name in ("responses", "mask")}
    swapped["first_is_better"] = ~batch["first_is_better"]
    one, other = (offline(params, {"reference": frozen["reference"]}, each, KEY) for each in (batch, swapped))
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-6)
    assert_gradients_close(one.gradients, other.gradients, rtol=1e-5)


def test_reference_and_annotator_get_no_gradient():
    params, frozen = models()

    def loss(frozen, batch):
        return step.online(params, frozen, batch, KEY, objective=ONLINE).loss

    gradients = jax.jit(jax.grad(loss))(frozen, prompts())
    assert jax.tree.structure(gradients) == jax.tree.structure(frozen)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(online().gradients))


def test_gradient_is_the_losses_slope():
    """A small step along the gradient changes the loss of the same pairs by its squared norm."""
    params, frozen = models()
    offline = jax.jit(functools.partial(step.offline, objective=PAIR))
    batch, gradients = pairs_of(online().outputs), online().gradients
    squared = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(gradients))
    size = 1e-2 / squared**0.5  # far above float32's noise, small enough for the second order to be under a per cent
    up, down = (
        offline(jax.tree.map(lambda p, g, by=by: p + by * g, params, gradients), frozen, batch, KEY).loss
        for by in (size, -size)
    )
    rise = float(up) - float(down)
    assert rise == pytest.approx(2 * size * squared, rel=1e-2)


# ------------------------------------------------------------------------------------------------ labels


def labels(p_orders, finished, missing_eos: str, identical=False) -> tuple[bool, float]:
    first, weight = step.decide(
        jnp.array([p_orders], jnp.float32), jnp.array([identical]), jnp.array([finished]), missing_eos
    )
    return bool(first[0]), float(weight[0])


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
    objective = dataclasses.replace(ONLINE, missing_eos=missing_eos)

    @jax.jit
    def collect(batch):
        drawn = step.draw(params, batch, KEY, online=objective)
        p_orders = step.ask(frozen, batch, drawn, online=objective)
        return step.label(drawn.tokens, drawn.mask, drawn.finished, p_orders, missing_eos)

    made, outputs, sums = jax.device_get(collect(prompts(seed=2)))
    finished = np.any(np.isin(made.responses, STOP) & made.mask, axis=-1)
    differs, says_first = finished[:, 0] != finished[:, 1], outputs["p_orders"].mean(-1) > 0.5
    assert np.any(differs & (finished[:, 0] != says_first)), "no pair where the rule decides"
    want = np.where(differs, finished[:, 0], says_first) if missing_eos == "loses" else says_first
    np.testing.assert_array_equal(made.first_is_better, want)
    assert made.weight.sum() == ROWS
    assert sums["abstained"][0] == 0


# ------------------------------------------------------------------------------------------------ the whole step


def train_step(objective, mesh: Mesh, parts: int = 1):
    """As train.run compiles it."""
    return jax.jit(
        functools.partial(step.train_step, objective=objective, tx=TX, parts=parts),
        donate_argnames="state",
        out_shardings=(state.state_shardings(models()[0], TX, mesh), None, None),
    )


def begin(mesh: Mesh, params=None) -> state.TrainState:
    return state.create(models()[0] if params is None else params, TX, mesh)


@pytest.mark.parametrize(("mesh_name", "parts"), [("one device", 2), ("2x2x2", 1)])
def test_one_trace_in_three_steps_and_donation(mesh_name, parts):
    mesh = mesh_of(mesh_name)
    traced = []

    def objective(*args):
        traced.append(1)
        return step.online(*args, objective=ONLINE)

    take, training = train_step(objective, mesh, parts), begin(mesh)
    frozen = {name: place(tree, mesh) for name, tree in models()[1].items()}
    drawn, after_one = [], None
    for number in range(3):
        old = training
        training, metrics, outputs = take(old, frozen, place_batch(prompts(number), mesh), KEY)
        drawn.append(np.asarray(outputs["responses"]))
        after_one = after_one or len(traced)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "the old state's buffers are kept"
        assert int(training.step) == number + 1
        assert np.isfinite(float(metrics["loss"]))
        assert float(metrics["changed"]) > 0.9
    assert len(traced) == after_one <= 1 + (parts > 1)  # with parts once more for the shapes
    assert take._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    want = state.state_shardings(training.params, TX, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, on: x.sharding.is_equivalent_to(on, x.ndim), training, want))
    assert not np.array_equal(drawn[0], drawn[1])


def test_each_step_draws_anew():
    """The same prompts at the next step meet other random numbers."""
    mesh = mesh_of("one device")
    take, frozen = train_step(functools.partial(step.online, objective=ONLINE), mesh), models()[1]
    drawn = []
    for number in (0, 0, 1):
        start = dataclasses.replace(begin(mesh), step=jnp.array(number, jnp.int32))
        _, _, outputs = take(start, frozen, place_batch(prompts(), mesh), KEY)
        drawn.append(np.asarray(outputs["responses"]))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("why", ["identical", "undecided"])
def test_nothing_moves_where_every_pair_abstains(why):
    """Neither parameters (by weight decay) nor moments (by their decay); the step counts."""
    mesh = mesh_of("one device")
    params, frozen = models()
    objective = dataclasses.replace(ONLINE, missing_eos="ignore")
    take = train_step(functools.partial(step.online, objective=objective), mesh, parts=2)
    batch = place_batch(prompts(seed=3), mesh)
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
    assert bool(np.all(outputs["identical"])) == (why == "identical")
    assert int(second.step) == 2
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.array_equal(a, b), jax.device_get((second.params, second.optimizer)), before)
    )


def test_loss_is_divided_by_the_weight_of_all_parts():
    """A mean over pairs that count, not a mean of the parts' means; pairs that don't count change nothing."""
    params, frozen = models()
    batch = pairs_of(online().outputs)
    weights = np.zeros(ROWS, np.float32)
    weights[[0, 2, 4, 6, 8, 3]] = 1.0  # five rows of one part of two, one of the other

    def objective(params, frozen, batch, key):
        pair = step.Pairs(batch["responses"], batch["mask"], batch["first_is_better"], batch["weight"])
        return step.pair_contribution(params, frozen, batch, pair, objective=PAIR)

    mesh = mesh_of("one device")
    take = train_step(objective, mesh, parts=2)
    _, whole, _ = take(begin(mesh, params), frozen, batch | {"weight": weights}, KEY)
    kept = np.flatnonzero(weights)
    margins = log_ratios(params, frozen["reference"], batch)
    chosen = np.where(batch["first_is_better"], 0, 1)
    rows = np.arange(ROWS)
    margin = (margins[rows, chosen] - margins[rows, 1 - chosen])[kept]
    assert float(whole["weight"]) == len(kept)
    assert float(whole["loss"]) == pytest.approx(np.mean(np.logaddexp(0, -0.1 * margin)), rel=1e-5)
    assert float(whole["margin"]) == pytest.approx(margin.mean(), rel=1e-4)
    assert float(whole["accuracy"]) == pytest.approx(np.mean(margin > 0))


def log_ratios(params, reference, batch) -> np.ndarray:
    args = [jnp.asarray(batch[name]) for name in ("prompts", "prompt_valid", "responses", "mask")]
    score = jax.jit(lambda p: step.pairs.response_logprobs(p, *args, cfg=MODEL, compute=COMPUTE).sum(-1))
    return np.asarray(score(params)) - np.asarray(score(reference))


def test_a_pair_without_weight_poisons_nothing():
    """Its loss may be infinite: neither the sum nor the gradients notice."""
    params, frozen = models()
    tokens, mask = right_padded(3, (ROWS, 2, RESPONSE))
    tokens = np.array(tokens)
    tokens[0, 0, 0] = MODEL.vocab_size + 1  # an id that the policy gives no probability, and the reference does
    pair = dataclasses.replace(PAIR, loss="ipo", reference=dataclasses.replace(MODEL, vocab_size=64))
    first = np.ones(ROWS, bool)
    batch = {name: x for name, x in prompts().items() if name.startswith("prompt")}

    @jax.jit
    def contribute(batch, weight):
        pairs = step.Pairs(jnp.asarray(tokens), mask, jnp.asarray(first), weight)
        return step.pair_contribution(params, frozen, batch, pairs, objective=pair)

    ones = np.ones(ROWS, np.float32)
    assert not np.isfinite(contribute(batch, ones).loss)
    without = contribute(batch, np.where(np.arange(ROWS) == 0, 0.0, ones).astype(np.float32))
    assert np.isfinite(without.loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(without.gradients))
    assert without.weight == ROWS - 1


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_policy_equal_to_the_reference_has_the_losses_value_at_zero(loss):
    params, _ = models()
    pair = dataclasses.replace(PAIR, loss=loss)
    offline = jax.jit(functools.partial(step.offline, objective=pair))
    found = offline(params, {"reference": params}, pairs_of(online().outputs), KEY)
    want = {"dpo": np.log(2), "ipo": 25.0, "ipo_mean": 25.0, "slic": 1.0}[loss]  # (1 / 0.2)^2
    assert float(found.loss) / ROWS == pytest.approx(want, rel=1e-5)
    assert float(found.sums["kl"][0]) == pytest.approx(0.0, abs=1e-4)


def test_names_give_different_keys():
    names = ("sample", "train", "evaluation", "reference")
    data = {tuple(np.asarray(jax.random.key_data(step.named_key(KEY, name)))) for name in names}
    assert len(data) == len(names)
    rows = jax.random.key_data(step.row_keys(KEY, jnp.arange(5)))
    assert len({tuple(np.asarray(row)) for row in rows}) == 5
