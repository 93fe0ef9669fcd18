"""Benchmark: 17.8M parameters, long prompts, for two CPU cores.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m launch.bench --config=experiments/bench_18m.py --out=bench.json

Sets beside common.base(): policy.init, policy.shape.*, annotator.init, annotator.question_tokens, data.batch,
data.prompt_tokens, data.response_tokens, and the section bench, which launch/bench_setup.py reads.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base(), what is set here, and the section bench; locked."""
    shape = {"width": 384, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 64, "mlp": 1152}
    config = common.base()
    config.policy.init = "scratch"
    config.policy.shape = shape
    config.annotator.init = "scratch"
    config.annotator.question_tokens = 416  # every question is this long: an instruction and the prompt
    config.data.batch = 8
    config.data.prompt_tokens = 384  # every prompt is this long
    config.data.response_tokens = 64  # every response is this long
    config.bench = {
        "vocab_size": 8192,
        "tied": False,  # the head has parameters of its own
        "annotator": shape,  # as large as the policy
        "label_tokens": 18,  # of the instruction around two responses, in each presentation order
    }
    return config.lock()
