"""Benchmarks: random models of given shapes, and rows of one length, for `python -m launch.bench`.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m launch.bench --config=experiments/bench.py:18m --out=bench.json

The section bench beside the keys of every run is read by launch/bench_setup.py.
"""

from ml_collections import ConfigDict

from experiments import family

MEMBERS = {
    "tiny": "a size that takes seconds: whether it runs, not how fast",
    "4m": "4.5M parameters, short prompts, for two CPU cores",
    "18m": "17.8M parameters, long prompts, for two CPU cores",
    "smollm2": "SmolLM2-135M's shape, with its large vocabulary and its tied head, for two CPU cores",
    "llama_0.5b": "half a billion parameters in bfloat16, for one GPU",
}
SHAPES = {
    "4m": {"width": 256, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64, "mlp": 768},
    "18m": {"width": 384, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 64, "mlp": 1152},
    "smollm2": {"width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp": 1536},
    "llama_0.5b": {"width": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 64, "mlp": 4608},
}


def get_config(argument: str | None = None) -> ConfigDict:
    """A member of the family, with the section bench; locked."""
    (name,) = family.parts("bench", argument, MEMBERS)
    config = family.base()
    config.policy.init = "scratch"
    config.annotator.init = "scratch"
    if name == "tiny":
        config.policy.shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
        annotator = {"width": 48, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 12, "mlp": 64}
    else:
        config.policy.shape = annotator = SHAPES[name]  # an annotator as large as the policy
    # Every prompt, response and question (an instruction and the prompt) is as long as its limit.
    data = config.data
    data.batch, data.prompt_tokens, data.response_tokens, config.annotator.question_tokens, vocab_size = {
        "tiny": (8, 16, 6, 24, 96),
        "4m": (16, 64, 64, 96, 2048),
        "18m": (8, 384, 64, 416, 8192),
        "smollm2": (4, 96, 48, 128, 49152),
        "llama_0.5b": (64, 512, 128, 576, 32768),
    }[name]
    if name == "smollm2":
        config.mesh.cpu_devices = (
            1  # with both cores: parameters, moments and a token's weights are moved once, not twice
        )
    if name == "llama_0.5b":
        config.compute.dtype = "bfloat16"
        config.compute.frozen = "bfloat16"
        config.compute.decode = "scanned"
        config.compute.remat = (
            "dots"  # 50,000 columns through 24 layers: attention's weights alone would fill the memory
        )
    config.bench = {
        "vocab_size": vocab_size,
        "tied": name == "smollm2",  # whether the head is the embedding
        "annotator": annotator,
        "label_tokens": 9
        if name == "tiny"
        else 18,  # of the instruction around two responses, in each presentation order
    }
    return config.lock()
