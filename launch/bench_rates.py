"""What the devices can do together: their rate of matrix products and their memory bandwidth, measured."""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WIDTH = 2048  # of the product that gives the rate
LEAST_SECONDS = 0.05  # about how long a measurement lasts at least, far above the time of a dispatch
COPY_BYTES = {"cpu": 2**27, "gpu": 2**30, "tpu": 2**29}  # of each of two arrays; several times larger than any cache

Measurement = Callable[[], float]  # what is done in a second, measured now


def seconds(call: Callable[[], object]) -> float:
    """The time until all results of a call are there."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


@functools.partial(jax.jit, donate_argnums=0)
def _products(x: Float[Array, "D D"], weight: Float[Array, "D D"], count: Array) -> Float[Array, "D D"]:
    return jax.lax.fori_loop(0, count, lambda _, x: x @ weight, x)


@functools.partial(jax.jit, donate_argnums=0)
def _triad(x: Float[Array, " M"], y: Float[Array, " M"], count: Array) -> Float[Array, " M"]:
    return jax.lax.fori_loop(0, count, lambda _, x: y + 0.5 * x, x)


def _often_enough(run: Callable[[int], object]) -> int:
    """How often the work is done in one measurement, so that it lasts LEAST_SECONDS."""
    jax.block_until_ready(run(1))
    once = seconds(lambda: run(1))
    return max(1, round(LEAST_SECONDS / once))


def _together(work: Callable, first: Array, other: Array, devices: Sequence[jax.Device]) -> Callable[[int], object]:  # type: ignore[reportInvalidTypeForm]
    """work(x, other, count) on all devices at a time; each keeps its own x from call to call."""
    cells = [jax.device_put(first, device) for device in devices]
    others = [jax.device_put(other, device) for device in devices]

    def run(count: int) -> list[Array]:
        cells[:] = [work(cell, other, count) for cell, other in zip(cells, others, strict=True)]
        return cells

    return run


def matrix_rate(dtype: str, devices: Sequence[jax.Device]) -> Measurement:  # type: ignore[reportInvalidTypeForm]
    """Operations per second of products [2048, 2048] x [2048, 2048] of a type, one after another on each device, all devices
    together: CPU devices share the cores."""
    key = jax.random.key(0)
    draw = lambda key: jax.random.normal(key, (WIDTH, WIDTH)).astype(dtype)  # noqa: E731
    weight = draw(key) * jnp.asarray(WIDTH**-0.5, dtype)  # so that products neither grow nor vanish
    run = _together(_products, draw(jax.random.fold_in(key, 1)), weight, devices)
    count = _often_enough(run)
    return lambda: len(devices) * count * 2 * WIDTH**3 / seconds(lambda: run(count))


def bandwidth(devices: Sequence[jax.Device]) -> Measurement:  # type: ignore[reportInvalidTypeForm]
    """Bytes per second of x <- y + x / 2 over arrays that fit no cache: two are read, one is written, in place; of all devices
    together."""
    size = COPY_BYTES[jax.default_backend()] // 4
    run = _together(_triad, jnp.zeros(size), jnp.ones(size), devices)
    count = _often_enough(run)
    return lambda: len(devices) * count * 3 * 4 * size / seconds(lambda: run(count))
