"""Packages oaif_jax; pyproject.toml holds the tools' tables only."""

from setuptools import find_packages, setup

# Lower bounds only where an older release is known to differ: the JAX family, at the releases that the tests run with.
# constraints.txt pins the whole closure.
REQUIRES = (
    "absl-py",
    "flax>=0.12",
    "grain>=0.2",
    "jax>=0.10",
    "jinja2>=3.1.6",  # chat templates are strangers' programs: older sandboxes had holes
    "jaxtyping",
    "matplotlib",
    "ml_collections",
    "numpy>=2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "protobuf",
    "pyarrow",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboardX",
    "tensorflow-datasets>=4.9.10",  # reads and writes array_record without TensorFlow
    "tensorstore",  # which Orbax brings along: buckets
    "tokenizers",
)

EXTRAS = {
    # pyright[nodejs]: its JavaScript runtime as a wheel, so that the type check needs pip only.
    # torch and transformers: what models from released directories are compared with.
    "test": [
        "beartype",
        "gguf",
        "kubeflow-trainer-api",  # JobSet's schema as Python types
        "optuna",
        "peft",
        "pre-commit",
        "pyright[nodejs]",
        "pytest",
        "pytest-xdist",
        "qwix",
        "ruff",
        "torch",
        "transformers",
    ],
    "real": ["accelerate", "gguf", "torch", "transformers"],  # what reads GGUF files, as that of `make real`
    "lora-quant": ["qwix"],
    "optuna": ["optuna"],
    "peers": ["torch", "trl"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
}

setup(
    name="oaif_jax",
    version="0.1.0",
    description="Online AI feedback and self-exploring alignment of language models in JAX, from a laptop to a TPU pod",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["oaif_jax", "oaif_jax.*", "experiments", "experiments.*", "launch", "launch.*"]),
    package_data={
        "experiments.everyday": ["*.txt", "*.jsonl"],
        "oaif_jax": ["py.typed"],
        "oaif_jax.annotate": ["instructions/*.txt"],
        "oaif_jax.tiny": ["chat_template.jinja", "assets/**/*", "instructions/*.txt"],
    },
    install_requires=list(REQUIRES),
    extras_require=EXTRAS,
    zip_safe=False,
)
