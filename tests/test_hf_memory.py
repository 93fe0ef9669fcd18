"""Loading takes little memory beyond the parameters: measured in a process of its own, as anonymous memory.

By hand on any size, which writes a random Llama of about so many GB in bfloat16 and loads it:
PYTHONPATH=. python tests/test_hf_memory.py DIRECTORY 4 bfloat16
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MB = 10**6
SHAPE = {"model_type": "llama", "vocab_size": 8000, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": 1}  # fmt: skip


def write(directory: pathlib.Path, width: int, mlp: int, layers: int, shards: int) -> None:
    """A random Llama in bfloat16, one file after the other."""
    import ml_dtypes
    import safetensors.numpy

    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(SHAPE | sizes))
    top = {"embed_tokens": (SHAPE["vocab_size"], width), "norm": (width,)}
    own = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 2, width),
        "self_attn.v_proj": (width // 2, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = [(f"model.{name}.weight", shape) for name, shape in top.items()]
    shapes += [(f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in own.items()]
    rng, weight_map = np.random.default_rng(0), {}
    largest = max(int(np.prod(shape)) for _, shape in shapes)
    noise = rng.integers(0, 2**14, largest, np.uint16).view(ml_dtypes.bfloat16)
    for number in range(shards):
        name = f"model-{number:05d}.safetensors"
        part = {key: noise[: int(np.prod(shape))].reshape(shape) for key, shape in shapes[number::shards]}
        weight_map |= dict.fromkeys(part, name)
        safetensors.numpy.save_file(part, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous() -> int:
    """Bytes of this process that no file stands behind (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measure(directory: str, dtype: str) -> dict[str, float]:
    """Loads onto all devices; sizes and the peak beyond what there was before, in MB."""
    import jax

    from oaif_jax.models.sharding import make_mesh
    from oaif_jax.stored import hf

    count = jax.device_count()
    mesh = make_mesh(-1, 1 if count == 1 else 2, 1 if count == 1 else 2)
    jax.block_until_ready(jax.device_put(np.zeros(MB), jax.devices()[0]))
    before, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    params = jax.block_until_ready(hf.load(hf.read(directory), mesh, dtype))
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return {
        "parameters": held / MB,
        "largest shard": max(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / MB,
        "peak": (max(seen) - before) / MB,
        "samples": len(seen),
        "seconds": seconds,
    }


def in_a_process(directory: pathlib.Path, dtype: str, devices: int) -> dict[str, float]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | flags
    command = [sys.executable, __file__, str(directory), "measure", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Beyond the parameters: one device's part of one stacked leaf, one layer's tensor, and change.

    Reading the files first would take 1 x the parameters more, stacking a leaf from a list 1 x the leaf.
    """
    write(tmp_path, width=1024, mlp=4096, layers=8, shards=3)
    for dtype, devices in (("bfloat16", 1), ("float32", 4)):
        found = in_a_process(tmp_path, dtype, devices)
        assert found["parameters"] > 200
        assert found["samples"] > 20
        assert found["parameters"] <= found["peak"] + 20, found  # they are all there, and none is a page of a file
        assert found["peak"] <= found["parameters"] + found["largest shard"] + 60, found


if __name__ == "__main__":
    place, size, kind = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if size != "measure":
        place.mkdir(parents=True)
        write(place, width=4096, mlp=11008, layers=round(float(size) * 1000 / 371), shards=4)  # MB to a layer
    print(json.dumps(measure(str(place), kind)))
