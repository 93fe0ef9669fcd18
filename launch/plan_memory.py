"""Memory of one device by tree, by arithmetic: what a run keeps all the time, and what a step and an evaluation need beside it.

What is kept is exact but for the padding of layouts, and for a frozen model in two roles, which a run has once. What passes is an
estimate of the largest arrays that are there at one time; the compiled program has the last word on it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from launch.bench_count import key_values, matrices
from launch.plan_step import Planned, annotators_mesh, frozen_models, method_of, parameters, trained
from oaif_jax.config.keys import Compute, Eval
from oaif_jax.config.keys import Mesh as Axes
from oaif_jax.models import sharding
from oaif_jax.models.attention import blocks
from oaif_jax.models.config import ModelConfig
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import eval_chunk
from oaif_jax.types import REFERENCE
from oaif_jax.update import optim, state

Trees = dict[str, int]  # bytes of one device, by name
FLOAT = 4  # bytes of what is float32 whatever compute.dtype is


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    kept: Trees  # policy, optimizer, base, reference, annotator, judge: all the time
    step: Trees  # gradients, cache, temporaries: while a step is taken
    evaluation: Trees  # cache, temporaries: while one is made

    @property
    def total(self) -> int:
        """At the larger one of the two."""
        return sum(self.kept.values()) + max(sum(self.step.values()), sum(self.evaluation.values()))


def memory(planned: Planned, mesh: Mesh) -> Memory:
    """All of it. UserError where the mesh doesn't divide a parameter."""
    return Memory(kept(planned, mesh), step(planned, mesh), evaluation(planned, mesh))


# ------------------------------------------------------------------------------------------------ trees


def size_of(tree: PyTree) -> int:
    """Bytes of a device's part of arrays that know where they lie; two codes of four bits share a byte."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        bits = 4 if leaf.dtype == jnp.uint4 else 8 * leaf.dtype.itemsize
        return math.prod(shape) * bits // 8

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """Parameters' shapes, and where they lie."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        sharding.param_shardings(tree, mesh),
    )


def kept(planned: Planned, mesh: Mesh) -> Trees:
    """What lies on a device all the time, models that only evaluations ask among them."""
    cfg = planned.cfg
    # Keys that change nothing of the training state, so that one is traced for all micro-batches of a search.
    same = dataclasses.replace(
        cfg, optimizer=dataclasses.replace(cfg.optimizer, accumulate=1), eval=Eval(), mesh=Axes()
    )
    params, moments = training_state(dataclasses.replace(planned, cfg=same), mesh)
    found = {"policy": params, "optimizer": moments}
    models = dict(frozen_models(planned))
    if "reference" not in models and not planned.rank:  # evaluations compare with it, whatever the loss does
        models["reference"] = parameters(planned.policy.cfg, cfg.compute.frozen)
    if planned.judge is not None:
        models["judge"] = parameters(planned.judge.cfg, cfg.compute.frozen)
    places = {"annotator": annotators_mesh(planned, mesh)}
    return found | {name: size_of(placed(tree, places.get(name, mesh))) for name, tree in models.items()}


@functools.lru_cache(maxsize=128)
def training_state(planned: Planned, mesh: Mesh) -> tuple[int, int]:
    """Bytes of what is trained, and of the optimizer's state."""
    tx = optim.optimizer(optimizer_config(planned.cfg))
    training = state.abstract(trained(planned), tx, mesh, planned.cfg.compute.trained)
    return size_of(training.params), size_of(training.optimizer)


# ------------------------------------------------------------------------------------------------ a step


def step(planned: Planned, mesh: Mesh) -> Trees:
    """Gradients, the sampled responses' cache, and temporaries: of the phases, which follow one another, the largest."""
    cfg, policy, sizes = planned.cfg, planned.policy.cfg, planned.sizes
    shape, compute = mesh.shape, cfg.compute
    itemsize, parts, tensor = jnp.dtype(compute.dtype).itemsize, cfg.optimizer.accumulate, mesh.shape["tensor"]
    rows = -(-sizes.prompts // parts // (shape["data"] * shape["fsdp"]))
    own = size_of(placed(trained(planned), mesh))
    in_float32 = own * FLOAT // jnp.dtype(compute.trained).itemsize
    # The sum of all micro-batches' gradients beside those of one; at the end they are float32.
    gradients = in_float32 + own if parts > 1 else max(own, in_float32)
    prompts, responses = sizes.prompt, sizes.completions * sizes.response
    residual = policy.layers * rows * policy.width * itemsize // (tensor if compute.sequence_parallel else 1)
    inner = _inner(policy, compute.remat) * policy.layers * rows * itemsize // tensor
    whole = working_set(policy, rows, prompts + responses, compute, shape)
    head = head_chunk(policy, compute.head_chunk, rows, itemsize, shape)
    # Of a trained embedding and of the head, before they are summed over `fsdp`.
    of_head = 0 if planned.rank else 2 * policy.padded_vocab_size // tensor * policy.width * FLOAT
    update = residual * responses + inner * (prompts + responses) + 2 * (whole + head) + of_head
    if planned.has_value:  # its rows are kept beside the policy's
        update += (residual + inner) * (prompts + responses)
    working = {"reference": whole + head, "update": update}
    # The pass over the prompts, from which responses are drawn, is kept until the gradient is taken.
    training = {"gradients": gradients, "cache": 0, "temporaries": residual * prompts + max(working.values())}
    if planned.annotator is None:
        return training
    cache = rows * (prompts + sizes.sampled * sizes.response) * key_values(policy) * itemsize // tensor
    cache *= 1 + (REFERENCE in method_of(cfg).writers)
    columns = sizes.question + planned.asked * sizes.order
    drawing = {
        "decode": decoding(planned, rows * shape["fsdp"], sizes.sampled, mesh),
        "annotate": working_set(planned.annotator.cfg, rows, columns, compute, shape),
    }
    if planned.is_ahead:  # one program after the other
        before = {"gradients": 0, "cache": cache, "temporaries": max(drawing.values())}
        return max(before, training, key=lambda trees: sum(trees.values()))
    largest = max(*working.values(), *drawing.values())
    return {"gradients": gradients, "cache": cache, "temporaries": residual * prompts + largest}


def _inner(cfg: ModelConfig, remat: str) -> int:
    """Numbers of one token in one layer that the backward pass keeps beside the residual stream."""
    products = cfg.kv_heads * (cfg.groups + 2) * cfg.head_dim + (2 if cfg.gated else 1) * cfg.mlp + 2 * cfg.width
    return {"layer": 0, "dots": products, "none": 2 * products}[remat]


def working_set(cfg: ModelConfig, rows: int, columns: int, compute: Compute, shape: Mapping[str, int]) -> int:
    """Bytes of one layer at work on whole rows: the residual stream beside the larger one of attention, with the weights of a
    block of queries unless a kernel computes it, and the MLP; and the parameters of two layers, gathered over `fsdp`."""
    itemsize = jnp.dtype(compute.dtype).itemsize
    tensor, tokens = shape["tensor"], rows * columns * itemsize
    block = max(end - first for first, end in blocks(columns)) if compute.attention == "parts" else 0
    weights = 3 * rows * (cfg.heads // tensor) * block * columns * FLOAT // 2
    attention = 2 * tokens * (cfg.heads + cfg.kv_heads) * cfg.head_dim // tensor + weights
    mlp = 2 * tokens * cfg.mlp // tensor
    return 2 * tokens * cfg.width + max(attention, mlp) + 2 * matrices(cfg) // cfg.layers // tensor * itemsize


def head_chunk(cfg: ModelConfig, chunk: int, rows: int, itemsize: int, shape: Mapping[str, int]) -> int:
    """Bytes of a chunk's logits, twice, and of the head gathered over `fsdp`; a chunk has at least one token of each row."""
    tokens = rows * max(1, chunk // (rows * shape["data"] * shape["fsdp"]))
    columns = cfg.padded_vocab_size // shape["tensor"]
    return columns * (2 * tokens * FLOAT + cfg.width * itemsize)


def decoding(planned: Planned, rows: int, completions: int, mesh: Mesh) -> int:
    """Bytes of the policy in the type of the products, which the token loop reads, and of a token's logits, whose rows lie along
    `data` alone."""
    policy, compute = planned.policy.cfg, planned.cfg.compute
    is_cast = not planned.rank and compute.trained != compute.dtype
    copy = size_of(placed(parameters(policy, compute.dtype), mesh)) if is_cast else 0
    logits = 3 * rows * completions * policy.padded_vocab_size // mesh.shape["tensor"] * FLOAT
    return copy + logits


# ------------------------------------------------------------------------------------------------ an evaluation


def evaluation(planned: Planned, mesh: Mesh) -> Trees:
    """Of two responses to each example of a chunk: drawing them, log-ratios, and the judge's questions, one after another."""
    cfg, policy, sizes = planned.cfg, planned.policy.cfg, planned.sizes
    shape, itemsize = mesh.shape, jnp.dtype(cfg.compute.dtype).itemsize
    rows = -(-eval_chunk(cfg) // (shape["data"] * shape["fsdp"]))
    columns = sizes.prompt + 2 * sizes.response
    cache = rows * columns * key_values(policy) * itemsize // shape["tensor"]
    chunk = cfg.compute.head_chunk
    scoring = working_set(policy, rows, columns, cfg.compute, shape) + head_chunk(policy, chunk, rows, itemsize, shape)
    working = {
        "drawing": cache + decoding(planned, rows * shape["fsdp"], 2, mesh),
        "prefill": cache + working_set(policy, rows, sizes.prompt, cfg.compute, shape),
        "log-ratios": scoring,
    }
    judge = planned.judge or (planned.annotator if cfg.judge.init == "annotator" else None)
    for name, model in {"judge": judge, "annotator": planned.annotator}.items():
        if model is not None:
            asked = working_set(model.cfg, rows, sizes.question + 2 * sizes.order, cfg.compute, shape)
            working[name] = asked + head_chunk(model.cfg, chunk, rows, itemsize, shape)
    largest = max(working, key=lambda name: working[name])
    has_cache = largest in ("drawing", "prefill")
    return {"cache": cache if has_cache else 0, "temporaries": working[largest] - (cache if has_cache else 0)}
