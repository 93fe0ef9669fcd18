"""What each phase of an online step has to do, counted from shapes: operations, bytes and tokens.

Operations are those of matrix products, two for a multiplication and its addition: attention over visible pairs only,
the backward pass twice the forward pass, nothing computed again, every column of a row through every layer. Bytes are
what no implementation can avoid: parameters once for each pass over them, keys and values, optimizer moments. Activations
count nothing, since they may stay in caches.
"""

import dataclasses

from oaif_jax.config import Config
from oaif_jax.models.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "nf4": 0.5}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase has to do. `tokens` are those it reads or writes, for tokens per second; `weights` are those of its bytes that
    are parameters, gradients and moments, which each copy of a model moves by itself."""

    operations: int = 0
    bytes: int = 0
    tokens: int = 0
    weights: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: int) -> "Work":
        """The same, so many times."""
        return Work(*(count * each for each in dataclasses.astuple(self)))

    def floor(self, operations_per_second: float, bytes_per_second: float) -> float:
        """Seconds below which this can't be done: the slower of the two, as if the other were hidden behind it."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and columns of a step: P prompts of S tokens, responses of R, questions of Q, presentation orders of W; C responses
    to a prompt, of which some are sampled."""

    prompts: int
    prompt: int
    response: int
    question: int
    order: int
    completions: int = 2
    sampled: int = 2


def matrices(cfg: ModelConfig) -> int:
    """Parameters of all layers' products."""
    qkv = cfg.width * cfg.kv_heads * (cfg.groups + 2) * cfg.head_dim
    out = cfg.heads * cfg.head_dim * cfg.width
    mlp = (3 if cfg.gated else 2) * cfg.width * cfg.mlp
    return cfg.layers * (qkv + out + mlp)


def head(cfg: ModelConfig) -> int:
    """Parameters of the language-model head."""
    return cfg.vocab_size * cfg.width


def parameters(cfg: ModelConfig) -> int:
    """Parameters of layers, embedding and head, without norms and biases."""
    return matrices(cfg) + head(cfg) * (1 if cfg.tied else 2)


def visible(first: int, count: int, window: int = 0) -> int:
    """Pairs of query and key of `count` tokens from position `first` on: each sees all positions up to its own, or the
    last `window` of them.

    In: first=2, count=3 -> Out: 3 + 4 + 5 = 12.
    """
    return sum(min(position + 1, window or position + 1) for position in range(first, first + count))


def attention(cfg: ModelConfig, first: int, count: int) -> int:
    """Operations of attention in all layers for `count` tokens from position `first` on: q k and weights v."""
    local = sum(cfg.local_layers)
    pairs = local * visible(first, count, cfg.window) + (cfg.layers - local) * visible(first, count)
    return 4 * cfg.heads * cfg.head_dim * pairs


def rows(cfg: ModelConfig, trunk: int, branches: int, branch: int) -> int:
    """Operations of a row with branches, in all layers; each branch's positions go on from the trunk's."""
    products = 2 * (trunk + branches * branch) * matrices(cfg)
    return products + attention(cfg, 0, trunk) + branches * attention(cfg, trunk, branch)


def key_values(cfg: ModelConfig) -> int:
    """Elements of one token's keys and values, in all layers."""
    return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim


def prefill(cfg: ModelConfig, sizes: Sizes, dtype: str) -> Work:
    """Prompts through the layers, and the logits of each first token."""
    operations = sizes.prompts * (rows(cfg, sizes.prompt, 0, 0) + 2 * head(cfg))
    weights = int(BYTES[dtype] * (matrices(cfg) + head(cfg)))
    cached = int(BYTES[dtype] * sizes.prompts * sizes.prompt * key_values(cfg))
    return Work(operations, weights + cached, sizes.prompts * sizes.prompt, weights)


def decode(cfg: ModelConfig, sizes: Sizes, dtype: str) -> Work:
    """The other tokens of the sampled responses. They share the prompt's keys and values, which are read once for all."""
    passes = sizes.response - 1
    tokens = sizes.sampled * sizes.prompts * passes
    operations = 2 * tokens * (matrices(cfg) + head(cfg))
    operations += sizes.sampled * sizes.prompts * attention(cfg, sizes.prompt, passes)
    suffix = sizes.sampled * visible(0, passes)
    cached = sizes.prompts * (passes * sizes.prompt + suffix) * key_values(cfg)
    weights = int(BYTES[dtype] * passes * (matrices(cfg) + head(cfg)))
    return Work(operations, weights + int(BYTES[dtype] * cached), tokens, weights)


def annotate(cfg: ModelConfig, sizes: Sizes, dtype: str) -> Work:
    """Questions and both presentation orders of each pair; the logits of two answers in each order."""
    orders = sizes.completions * (sizes.completions - 1)
    answers = 2 * 2 * orders * cfg.width
    operations = sizes.prompts * (rows(cfg, sizes.question, orders, sizes.order) + answers)
    weights = int(BYTES[dtype] * matrices(cfg))
    return Work(operations, weights, sizes.prompts * (sizes.question + orders * sizes.order), weights)


def reward(cfg: ModelConfig, sizes: Sizes, dtype: str) -> Work:
    """A reward model's scores of all responses: questions, and responses as branches."""
    count = sizes.completions
    operations = sizes.prompts * (rows(cfg, sizes.question, count, sizes.order) + 2 * count * cfg.width)
    weights = int(BYTES[dtype] * matrices(cfg))
    return Work(operations, weights, sizes.prompts * (sizes.question + count * sizes.order), weights)


def value(cfg: ModelConfig, sizes: Sizes, dtype: str, trained: str, additions: int = 0) -> Work:
    """What a value model adds to the update: the same passes without a language-model head."""
    head_tokens = sizes.prompts * sizes.completions * sizes.response
    of_policy = update(cfg, sizes, dtype, trained, additions)
    passes = 2 if additions else 3
    head_weights = 2 * int(BYTES[dtype] * head(cfg)) + (
        0 if additions else int(BYTES[trained] * head(cfg) * (not cfg.tied))
    )
    return Work(
        of_policy.operations - passes * 2 * head_tokens * head(cfg), of_policy.bytes - head_weights, of_policy.tokens,
        of_policy.weights - head_weights,
    )  # fmt: skip


def score(cfg: ModelConfig, sizes: Sizes, dtype: str) -> Work:
    """Log-probabilities of all responses: rows with branches, and the head at each response token."""
    count = sizes.completions
    operations = rows(cfg, sizes.prompt, count, sizes.response) + 2 * count * sizes.response * head(cfg)
    tokens = sizes.prompts * (sizes.prompt + count * sizes.response)
    weights = int(BYTES[dtype] * (matrices(cfg) + head(cfg)))
    return Work(sizes.prompts * operations, weights, tokens, weights)


def update(cfg: ModelConfig, sizes: Sizes, dtype: str, trained: str, additions: int = 0) -> Work:
    """Loss and gradients: parameters are read forward and backward, gradients are written. Where only `additions` to the
    parameters are trained (LoRA), these alone have gradients, and add a product of each token with each of them."""
    forward = score(cfg, sizes, dtype)
    operations, own = 3 * forward.operations, parameters(cfg)
    if additions:
        head_tokens = sizes.prompts * sizes.completions * sizes.response
        operations -= 2 * (forward.tokens * matrices(cfg) + head_tokens * head(cfg))
        operations += 6 * forward.tokens * additions
        own = additions
    weights = 2 * forward.weights + int(BYTES[trained] * own)
    return Work(operations, weights, forward.tokens, weights)


def optimizer(cfg: ModelConfig, name: str, trained: str, moments: str, additions: int = 0) -> Work:
    """Parameters and AdamW's two moments are read and written, gradients read. Adafactor's moments are next to nothing."""
    one = additions or parameters(cfg)
    state = 2 * one * (BYTES[moments] + BYTES["float32"]) if name == "adamw" else 0
    moved = int(3 * one * BYTES[trained] + state)
    return Work(0, moved, 0, moved)


def phases(cfg: Config, sizes: Sizes, policy: ModelConfig, annotator: ModelConfig) -> dict[str, Work]:
    """The phases of one step, in their order; the sum is the step's."""
    dtype, trained = cfg.compute.dtype, cfg.compute.trained
    return {
        "prefill": prefill(policy, sizes, dtype),
        "decode": decode(policy, sizes, dtype),
        "annotate": annotate(annotator, sizes, dtype),
        "reference": score(policy, sizes, dtype),
        "update": update(policy, sizes, dtype, trained),
        "optimizer": optimizer(policy, cfg.optimizer.name, trained, cfg.optimizer.moments),
    }
