"""Benchmark at a size that takes seconds: whether it runs, not how fast.

    python -m launch.bench --config=experiments/bench_tiny.py

Sets beside common.base(): policy.init, policy.shape.*, annotator.init, annotator.question_tokens, data.batch,
data.prompt_tokens, data.response_tokens, and the section bench, which launch/bench_setup.py reads.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base(), what is set here, and the section bench; locked."""
    config = common.base()
    config.policy.init = "scratch"
    config.policy.shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    config.annotator.init = "scratch"
    config.annotator.question_tokens = 24  # every question is this long
    config.data.batch = 8
    config.data.prompt_tokens = 16  # every prompt is this long
    config.data.response_tokens = 6  # every response is this long
    config.bench = {
        "vocab_size": 96,
        "tied": False,  # whether the head is the embedding
        "annotator": {
            "width": 48,
            "layers": 2,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 12,
            "mlp": 64,
        },  # as policy.shape
        "label_tokens": 9,  # of the instruction around two responses, in each presentation order
    }
    return config.lock()
