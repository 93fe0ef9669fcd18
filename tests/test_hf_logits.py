"""Every family's logits against transformers', in float32; and that the comparison sees each feature."""

import dataclasses
import functools

import hf_fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax.models import heads, transformer
from oaif_jax.models.config import ComputeConfig, RopeScaling
from oaif_jax.models.rows import trunk
from oaif_jax.stored import hf

COMPUTE = ComputeConfig()
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order, through four layers


# Small programs, most of them run once: to compile quickly is what counts.
@functools.partial(jax.jit, static_argnames="cfg", compiler_options={"xla_backend_optimization_level": 0})
def logits(params, tokens, valid, *, cfg):
    hidden, _ = transformer.forward(params, trunk(tokens, valid), cfg=cfg, compute=COMPUTE)
    flat = heads.logits(params, hidden.reshape(-1, cfg.width), cfg=cfg)
    return flat.reshape(*tokens.shape, -1)[..., : cfg.vocab_size]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that transformers made, wrote and ran, as we read it, and the logits that are wanted."""

    model: hf.HFModel
    params: dict
    expected: np.ndarray

    def error(self, params=None, **changes) -> float:
        """The largest difference of logits where there are tokens, as a part of the largest logit."""
        tokens, valid = hf_fakes.batch()
        cfg = dataclasses.replace(self.model.cfg, **changes)
        found = np.asarray(logits(params or self.params, tokens, valid, cfg=cfg))
        return np.abs(found - self.expected)[valid].max() / np.abs(self.expected[valid]).max()


@functools.cache
def case(name: str, directory) -> Case:
    theirs = hf_fakes.make(name)
    theirs.save_pretrained(directory / name)
    model = hf.read(directory / name)
    return Case(model, hf_fakes.load(model), hf_fakes.logits(theirs, *hf_fakes.batch()))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", hf_fakes.CASES)
def test_logits(name, directory):
    found = case(name, directory)
    assert np.abs(found.expected).max() > 2
    assert found.error() <= TOLERANCE


OFF = {
    "attention softcap": {"attention_softcap": 0.0},
    "final softcap": {"final_softcap": 0.0},
    "window": {"window": 0, "local_layers": ()},
    "post norms": {"post_norms": False},
    "norms of queries and keys": {"qk_norm": False},
    "norm offset": {"norm_unit_offset": False},
    "embedding scale": {"embedding_scaled": False},
    "rope scaling": {"rope_scaling": RopeScaling()},
    "local rope theta": {"local_rope_theta": 0.0},
    "query scale": {"query_scale": 0.0},
    "partial rotary": {"rotary_dim": 0},
    "parallel": {"parallel": False},
    "activation": {"activation": "silu"},
    "layer norm": {"norm": "rms"},
}
GEMMAS = ("final softcap", "window", "post norms", "norm offset", "embedding scale", "query scale", "activation")
FEATURES = {
    "llama": ("rope scaling",),
    "mistral": ("window",),
    "phi3": ("window",),
    "gemma2": ("attention softcap", *GEMMAS),
    "gemma3": ("norms of queries and keys", "rope scaling", "local rope theta", *GEMMAS),
    "qwen2": ("window",),
    "qwen3": ("norms of queries and keys",),
    "gpt_neox": ("partial rotary", "parallel", "activation", "layer norm"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "feature"), [(name, each) for name, features in FEATURES.items() for each in features]
)
def test_the_comparison_sees_each_feature(name, feature, directory):
    """Switched off, one at a time, a feature is missed by a hundred times the tolerance."""
    found = case(name, directory)
    changes = OFF[feature]
    assert any(getattr(found.model.cfg, key) != value for key, value in changes.items()), "it was off already"
    assert found.error(**changes) >= 100 * TOLERANCE


# What the plain families lack and Gemma has, and the other way round.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"norm_unit_offset": True}),
        ("llama", {"embedding_scaled": True}),
        ("llama", {"activation": "gelu"}),
        ("gpt_neox_sequential", {"parallel": True}),
    ],
)
def test_the_comparison_sees_what_is_off(name, changes, directory):
    assert case(name, directory).error(**changes) >= 100 * TOLERANCE


def with_zeros(params: dict, leaf: str) -> dict:
    group, _, name = leaf.rpartition("/")
    own = params[group]
    return params | {group: own | {name: jax.tree.map(jnp.zeros_like, own[name])}}


BIASES = ("layers/qkv_bias", "layers/out_bias", "layers/gate_bias", "layers/down_bias")


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("qwen2", BIASES[0])] + [(name, leaf) for name in ("llama_biased", "gpt_neox") for leaf in BIASES],
)
def test_the_comparison_sees_each_bias(name, leaf, directory):
    found = case(name, directory)
    assert found.error(with_zeros(found.params, leaf)) >= 100 * TOLERANCE
