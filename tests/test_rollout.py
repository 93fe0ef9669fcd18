"""What is sampled: by which distribution, from which keys, where it ends; and what the compiled program does for it."""

import collections
import dataclasses
import functools

import fakes
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from oaif_jax.models import heads, rows, sharding, transformer
from oaif_jax.models.attention import MASKED
from oaif_jax.models.config import ModelConfig
from oaif_jax.rollout import Sampler, categorical, named_key, restrict, sample
from oaif_jax.types import Prompts, Rollout

CFG, COMPUTE = fakes.MODEL, fakes.COMPUTE
PROMPTS, SLOTS, COMPLETIONS, TOKENS = 6, 5, 3, 9  # P, S, C, R
PAD = 0
STOPS = (2, *range(5, 43, 4))  # many, so that most rows end, at different times

SAMPLED = Sampler(temperature=0.9, top_k=0, top_p=1.0, max_tokens=TOKENS, stop_ids=STOPS, pad_id=PAD)
ENDLESS = dataclasses.replace(SAMPLED, stop_ids=())
GREEDY = dataclasses.replace(ENDLESS, temperature=0.0)

choose = jax.jit(categorical)
compiled = jax.jit(sample, static_argnames=("sampler", "completions", "cfg", "compute"))


@pytest.fixture(scope="module")
def params() -> dict:
    """With a small final norm: a distribution flat enough for samples to differ."""
    params = fakes.make_params()
    return params | {"final_norm": {"scale": params["final_norm"]["scale"] - 0.5}}


def prompts_of(seed: int = 8, count: int = PROMPTS) -> Prompts:
    return fakes.prompts_of(seed, count, SLOTS)


def key_of(seed: int) -> jax.Array:
    return jax.random.key(seed)


def draw(params, prompts: Prompts, key, sampler: Sampler, completions: int = COMPLETIONS) -> Rollout:
    """Completions on the host."""
    made = compiled(params, prompts, key, sampler=sampler, completions=completions, cfg=CFG, compute=COMPUTE)
    return jax.tree.map(np.asarray, made)


@jax.jit
def logits_of(params, prompts: Prompts, tokens, mask):
    """The logits that each response token should be drawn from, [P, C, R, V], by a full forward pass."""
    laid_out = rows.branch(prompts.tokens, prompts.valid, tokens, mask)
    hidden, _ = transformer.forward(params, laid_out, cfg=CFG, compute=COMPUTE)
    slots, (count, completions, width) = prompts.tokens.shape[1], tokens.shape
    own = hidden[:, slots:].reshape(count, completions, width, -1)[:, :, :-1]
    first = jnp.broadcast_to(hidden[:, None, slots - 1 : slots], (count, completions, 1, hidden.shape[-1]))
    hidden = jnp.concatenate([first, own], axis=2)
    return heads.logits(params, hidden.reshape(-1, CFG.width), cfg=CFG).reshape(*tokens.shape, -1)


@jax.jit
def uniform(key, numbers, like):
    """The random number of each token of `like` [P, C, R], from the key folded with row, completion and token."""

    def one(row, c, t):
        of_row = jax.random.fold_in(key, row)
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(of_row, c), t))

    over_tokens = jax.vmap(one, (None, None, 0))
    over_completions = jax.vmap(over_tokens, (None, 0, None))
    completions, tokens = (jnp.arange(size) for size in like.shape[1:3])
    return jax.vmap(over_completions, (0, None, None))(numbers, completions, tokens)


def inverse(uniform: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The first token at which the cumulated softmax exceeds the number, in float64."""
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    return (np.cumsum(probabilities, axis=-1) <= uniform[..., None].astype(np.float64)).sum(-1)


def test_greedy_is_the_largest_logit_of_the_full_forward(params):
    prompts = prompts_of()
    made = draw(params, prompts, key_of(0), GREEDY)
    logits = np.asarray(logits_of(params, prompts, made.tokens, made.mask))
    np.testing.assert_array_equal(made.tokens, logits.argmax(-1))
    assert len(np.unique(made.tokens)) > 5
    # Two largest logits nearer than rounding would make this a matter of luck.
    ordered = np.sort(logits, axis=-1)
    assert (ordered[..., -1] - ordered[..., -2]).min() > 1e-4


def test_each_token_has_its_key_and_the_full_forward_distribution(params):
    """Teacher-forced logits over the temperature, and the documented key, give each token: cache, temperature and keys
    are right at every position."""
    prompts, key = prompts_of(), key_of(1)
    made = draw(params, prompts, key, ENDLESS)
    logits = logits_of(params, prompts, made.tokens, made.mask) / ENDLESS.temperature
    np.testing.assert_array_equal(
        made.tokens, inverse(np.asarray(uniform(key, prompts.rows, made.tokens)), np.asarray(logits))
    )
    assert (made.tokens != np.asarray(logits).argmax(-1)).any()


def test_after_the_end(params):
    """Up to the first stop token, which is included, and nothing after it."""
    made = [draw(params, prompts_of(seed), key_of(seed), SAMPLED) for seed in range(20)]
    tokens, mask, finished = (
        np.concatenate([getattr(m, name) for m in made]) for name in ("tokens", "mask", "finished")
    )
    is_stop = np.isin(tokens, STOPS)
    ended_before = np.cumsum(is_stop, axis=-1) - is_stop > 0
    np.testing.assert_array_equal(mask, ~ended_before)
    assert (tokens[~mask] == PAD).all()
    np.testing.assert_array_equal(finished, (is_stop & mask).any(-1))
    assert tokens.max() < CFG.vocab_size
    assert set(tokens[is_stop & mask]) == set(STOPS)
    assert 0.1 < finished.mean() < 1.0


def test_the_loop_ends_with_the_longest_completion(params, monkeypatch):
    """A token of all completions at a time, and none that nobody needs: the first comes from the prompts' pass."""
    taken, decode = [], transformer.decode

    def counting(*args, **kwargs):
        jax.debug.callback(lambda: taken.append(1))
        return decode(*args, **kwargs)

    monkeypatch.setattr(transformer, "decode", counting)
    counted = jax.jit(  # a function of its own: what was traced before doesn't count
        lambda params, prompts, key: sample(
            params, prompts, key, sampler=SAMPLED, completions=2, cfg=CFG, compute=COMPUTE
        )
    )
    longest = []
    for seed in range(20):
        taken.clear()
        made = counted(params, prompts_of(seed, count=2), key_of(seed))
        jax.effects_barrier()
        longest.append(int(np.asarray(made.mask).sum(-1).max()))
        assert 1 + len(taken) == longest[-1]
    assert min(longest) < max(longest) == TOKENS


def test_all_end_at_once(params):
    everything = dataclasses.replace(SAMPLED, stop_ids=tuple(range(CFG.vocab_size)))
    made = draw(params, prompts_of(), key_of(0), everything)
    assert made.finished.all()
    np.testing.assert_array_equal(made.mask, np.broadcast_to(np.arange(TOKENS) == 0, made.mask.shape))


def test_none_ends(params):
    made = draw(params, prompts_of(), key_of(0), ENDLESS)
    assert made.mask.all()
    assert not made.finished.any()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_stop_ids_only_cut(params, temperature):
    """Until it ends, a response is what it would be without stop ids: the others' ends don't reach it."""
    cut, whole = (
        draw(params, prompts_of(), key_of(5), dataclasses.replace(SAMPLED, temperature=temperature, stop_ids=stops))
        for stops in (STOPS, ())
    )
    assert 0 < cut.finished.sum() < cut.finished.size
    np.testing.assert_array_equal(cut.tokens[cut.mask], whole.tokens[cut.mask])


def test_keys(params):
    """Same keys, same tokens; other keys, or another completion, others."""
    first, again, other = (draw(params, prompts_of(), key_of(seed), ENDLESS).tokens for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(-1).all()
    assert len(np.unique(first.reshape(-1, TOKENS), axis=0)) == PROMPTS * COMPLETIONS


def test_samples_do_not_depend_on_the_batch(params):
    """The same prompt with the same row number at another place, among other prompts, with other numbers; and alone."""
    prompts, key = prompts_of(), key_of(6)
    together = draw(params, prompts, key, SAMPLED)
    places = np.array([2, 5, 0])
    strangers = fakes.prompts_of(99, PROMPTS, SLOTS, first_row=70)
    moved = jax.tree.map(lambda theirs, ours: theirs.at[places].set(ours[:3]), strangers, prompts)
    elsewhere = draw(params, moved, key, SAMPLED)
    np.testing.assert_array_equal(elsewhere.tokens[places], together.tokens[:3])
    np.testing.assert_array_equal(elsewhere.mask[places], together.mask[:3])
    alone = draw(params, jax.tree.map(lambda x: x[:1], prompts), key, SAMPLED)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])


def test_names_give_different_keys():
    names = ("sample", "train", "evaluation", "reference")
    data = {tuple(np.asarray(jax.random.key_data(named_key(key_of(0), name)))) for name in names}
    assert len(data) == len(names)


def test_who_wrote_a_completion(params):
    made = sample(
        params, prompts_of(), key_of(0), sampler=SAMPLED, completions=2, cfg=CFG, compute=COMPUTE, by="reference"
    )
    assert made.by == ("reference", "reference")
    assert draw(params, prompts_of(), key_of(0), SAMPLED).by == ("policy",) * COMPLETIONS


def test_completions_do_not_depend_on_their_number(params):
    three = draw(params, prompts_of(), key_of(7), SAMPLED)
    one = draw(params, prompts_of(), key_of(7), SAMPLED, completions=1)
    np.testing.assert_array_equal(three.tokens[:, :1], one.tokens)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (0, 1e-6)])
def test_narrowest_is_greedy(params, top_k, top_p):
    greedy = draw(params, prompts_of(), key_of(0), GREEDY)
    narrow = draw(params, prompts_of(), key_of(0), dataclasses.replace(ENDLESS, top_k=top_k, top_p=top_p))
    np.testing.assert_array_equal(narrow.tokens, greedy.tokens)


def kept_by_definition(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The ids of one row that may be drawn, one after another from the largest on."""
    order = np.argsort(-logits)[: top_k or None]
    probabilities = np.exp(logits[order] - logits.max()) / np.exp(logits[order] - logits.max()).sum()
    kept, mass = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if kept and mass >= top_p:
            break
        kept.add(int(token))
        mass += probability
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_restrict(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32) * 2
    found = np.asarray(jax.jit(restrict, static_argnums=(1, 2))(logits_on_device(logits), top_k, top_p))
    for row, masked in zip(logits, found, strict=True):
        kept = kept_by_definition(row, min(top_k, 30), top_p)
        assert set(np.flatnonzero(masked > -1e20).tolist()) == kept
        np.testing.assert_array_equal(masked[list(kept)], row[list(kept)])


def logits_on_device(logits: np.ndarray) -> jax.Array:
    return jnp.asarray(logits)


def assert_drawn_from(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's test; tokens of which fewer than 5 are expected count as one."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    often = expected >= 5
    observed, wanted = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    assert often.sum() > 8, "a distribution so narrow shows little"
    statistic = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    # One in a thousand by chance, but seeds are fixed: it passes always or never.
    assert scipy.stats.chi2.sf(statistic, df=often.sum()) > 1e-3


def test_distribution(params):
    """8,192 first and second tokens of one prompt against the softmax at temperature 0.9."""
    count, short = 4096, dataclasses.replace(ENDLESS, max_tokens=2)
    one = jax.tree.map(lambda x: x[:1], prompts_of())
    prompts = Prompts(*(jnp.broadcast_to(x, (count, SLOTS)) for x in (one.tokens, one.valid)), jnp.arange(count))
    drawn = draw(params, prompts, key_of(12), short, completions=2).tokens.reshape(-1, 2)
    common = np.bincount(drawn[:, 0]).argmax()
    followed = jnp.asarray([[[common, 0]]], jnp.int32)
    logits = logits_of(params, one, followed, jnp.ones((1, 1, 2), bool))
    at_temperature = np.asarray(jax.nn.softmax(logits[0, 0, :, : CFG.vocab_size] / short.temperature), np.float64)
    assert_drawn_from(drawn[:, 0], at_temperature[0])
    assert_drawn_from(drawn[drawn[:, 0] == common, 1], at_temperature[1])
    # The test would notice another temperature.
    with pytest.raises(AssertionError):
        assert_drawn_from(drawn[:, 0], np.asarray(jax.nn.softmax(logits[0, 0, 0, : CFG.vocab_size] / 0.8)))


@pytest.mark.parametrize("vocabulary", [43, 64, 96, 8192])
def test_categorical_is_the_inverse_of_the_cumulated_softmax(vocabulary):
    """Where three tenths of the tokens are masked; numbers nearer to a step than rounding goes are either side's."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(500, vocabulary)).astype(np.float32) * 2
    logits[rng.random(logits.shape) < 0.3] = MASKED
    at = rng.random(500).astype(np.float32)
    found = np.asarray(choose(at, logits))
    steps = np.cumsum(scipy.special.softmax(logits.astype(np.float64), axis=-1), axis=-1)
    clear = np.abs(steps - at[:, None]).min(-1) > 1e-6
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], inverse(at, logits)[clear])
    low, high = (steps[np.arange(500), np.maximum(found - back, 0)] for back in (1, 0))
    assert (np.where(found > 0, low, 0.0) <= at + 1e-6).all()
    assert (at <= high + 1e-6).all()


@pytest.mark.parametrize("where", [[0], [42], [7, 21], list(range(0, 43, 3))])
@pytest.mark.parametrize("at", [0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_tokens_without_probability_are_never_drawn(where, at):
    """At both ends of the numbers, wherever the tokens with probability lie."""
    logits = np.full((3, 43), MASKED, np.float32)
    logits[:, where] = np.random.default_rng(len(where)).normal(size=(3, len(where))) * 20
    found = np.asarray(choose(np.full(3, at, np.float32), logits))
    assert np.isin(found, where).all()


def test_nothing_is_differentiated(params):
    """Responses that come out of a differentiated function are constants there."""

    def through(params):
        made = sample(params, prompts_of(), key_of(0), sampler=SAMPLED, completions=1, cfg=CFG, compute=COMPUTE)
        return jnp.sum(made.tokens * 1.0)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(through))(params)):
        assert (np.asarray(leaf) == 0).all()


# --- what the program does


def products(jaxpr, in_loop: bool = False):
    """(whether it is run for each token, shapes of the operands) of each matrix product, in nested programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield in_loop, tuple(operand.aval.shape for operand in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner, in_loop or equation.primitive.name == "while")


def test_one_prefill_for_all_samples_of_a_prompt(params):
    """Before the loop the weights meet P S rows; for each token P C."""
    program = jax.make_jaxpr(
        functools.partial(sample, sampler=SAMPLED, completions=COMPLETIONS, cfg=CFG, compute=COMPUTE)
    )(params, prompts_of(), key_of(0))
    weights = {(CFG.width, CFG.mlp), (CFG.mlp, CFG.width)}
    found = collections.Counter(
        (in_loop, shapes[0][0]) for in_loop, shapes in products(program.jaxpr) if shapes[1] in weights
    )
    assert found == {(False, PROMPTS * SLOTS): 3, (True, PROMPTS * COMPLETIONS): 3}
    before = {shape for in_loop, shapes in products(program.jaxpr) if not in_loop for shape in shapes}
    assert all(np.prod(shape[:-1]) < PROMPTS * COMPLETIONS * SLOTS for shape in before if shape[-1] == CFG.width)


# Eight layers, since the loop also holds one layer's keys and values at a time, an eighth of the cache.
DEEP = ModelConfig(vocab_size=43, width=16, layers=8, heads=2, kv_heads=2, head_dim=32, mlp=24)
ROWS = 3


def program_of(max_tokens: int, way: str = "scanned"):
    """The compiled sampler with suffixes of `max_tokens`."""
    compute = dataclasses.replace(COMPUTE, decode=way)
    arguments = (
        jax.eval_shape(functools.partial(transformer.init, cfg=DEEP), jax.random.key(0)),
        prompts_of(count=ROWS),
        key_of(0),
    )
    sampler = dataclasses.replace(SAMPLED, max_tokens=max_tokens)
    return compiled.lower(*arguments, sampler=sampler, completions=2, cfg=DEEP, compute=compute).compile()


def cache_bytes(max_tokens: int) -> int:
    """Keys and values of the suffixes."""
    return 2 * 4 * DEEP.layers * ROWS * 2 * DEEP.kv_heads * max_tokens * DEEP.head_dim


@pytest.fixture(scope="module")
def short_and_long():
    return {max_tokens: program_of(max_tokens) for max_tokens in (256, 512)}


def test_one_cache_at_a_time(short_and_long):
    """What grows with the length of the suffix, temporaries and outputs, is the cache once and less than a fifth of it more.

    The difference between two lengths, so that what doesn't grow (weights, the prefix) has no part in it. A cache that
    went through a loop's inputs and outputs would be there twice.
    """
    short, long = (short_and_long[size].memory_analysis().temp_size_in_bytes for size in short_and_long)
    caches = (long - short) / (cache_bytes(512) - cache_bytes(256))
    assert 1.0 <= caches < 1.2


@pytest.mark.slow
def test_one_cache_at_a_time_unrolled():
    short, long = (program_of(size, "unrolled").memory_analysis().temp_size_in_bytes for size in (256, 512))
    assert 1.0 <= (long - short) / (cache_bytes(512) - cache_bytes(256)) < 1.2


@pytest.mark.parametrize("vocabulary", [8192, 64 * 501])
def test_a_sharded_vocabulary_is_not_gathered(vocabulary):
    """Each device sums its own blocks of words; of a block that straddles devices all logits would be gathered."""
    mesh = sharding.make_mesh(1, 1, 4, jax.devices()[:4])
    on = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    arguments = (
        jax.ShapeDtypeStruct((6,), np.float32, sharding=everywhere),
        jax.ShapeDtypeStruct((6, vocabulary), np.float32, sharding=on),
    )
    program = hlo.parse(jax.jit(categorical, out_shardings=everywhere).lower(*arguments).compile().as_text())
    moved = [line for line in hlo.everything(program) if line.opcode.startswith(("all-gather", "collective", "all-to"))]
    assert all(np.prod(shape) < 6 * vocabulary / 4 for line in moved for shape in line.shapes)


def test_the_cache_is_updated_in_place(short_and_long):
    """In the token loop nothing makes an array of the cache's shape but the update itself."""
    program = hlo.parse(short_and_long[256].as_text())
    cache = (DEEP.layers, ROWS, DEEP.kv_heads, 2, 256, DEEP.head_dim)
    tokens = (ROWS, 2, 256)
    loops = [
        line
        for line in hlo.everything(program)
        if line.opcode == "while" and cache in line.shapes and tokens in line.shapes
    ]
    assert len(loops) == 1
    made = [line for line in hlo.inside(program, loops[0].called) if line.shapes == (cache,)]
    opcodes = {line.opcode for line in made}
    assert "dynamic-update-slice" in opcodes
    # A fusion's own instructions are among these lines.
    assert opcodes <= {"parameter", "get-tuple-element", "dynamic-update-slice", "fusion", "bitcast"}
