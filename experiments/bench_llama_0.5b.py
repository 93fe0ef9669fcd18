# ruff: noqa: N999  # a file that is named on the command line, and never imported
"""Benchmark: half a billion parameters in bfloat16, for one GPU.

    python -m launch.bench --config=experiments/bench_llama_0.5b.py --out=bench.json

Sets beside common.base(): policy.init, policy.shape.*, annotator.init, annotator.question_tokens, data.batch,
data.prompt_tokens, data.response_tokens, compute.dtype, compute.frozen, compute.decode, compute.remat, and the section
bench, which launch/bench_setup.py reads.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base(), what is set here, and the section bench; locked."""
    shape = {"width": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 64, "mlp": 4608}
    config = common.base()
    config.policy.init = "scratch"
    config.policy.shape = shape
    config.annotator.init = "scratch"
    config.annotator.question_tokens = 576  # every question is this long: an instruction and the prompt
    config.data.batch = 64
    config.data.prompt_tokens = 512  # every prompt is this long
    config.data.response_tokens = 128  # every response is this long
    config.compute.dtype = "bfloat16"
    config.compute.frozen = "bfloat16"
    config.compute.decode = "scanned"
    config.compute.remat = "dots"  # 50,000 columns through 24 layers: attention's weights alone would fill the memory
    config.bench = {
        "vocab_size": 32768,
        "tied": False,  # the head has parameters of its own
        "annotator": shape,  # as large as the policy
        "label_tokens": 18,  # of the instruction around two responses, in each presentation order
    }
    return config.lock()
