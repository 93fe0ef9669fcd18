"""What a model directory says about itself, before its parameters are read."""

import contextlib
import dataclasses
import functools
import pathlib

import jax
import numpy as np
from jaxtyping import PyTree

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file
from oaif_jax.models import transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored.hf.config import model_config
from oaif_jax.stored.hf.families import FAMILIES, family
from oaif_jax.stored.hf.tensors import has_weights, layers, open_tensors, weight_files
from oaif_jax.stored.hf.values import Values, read_json

ROWS = 4096  # of embedding and head that are compared at a time
MEAN, SCALE = "reward_mean", "reward_scale"  # keys of config.json that are this library's own
REWARD, LANGUAGE = "ForSequenceClassification", ("ForCausalLM", "ForConditionalGeneration")


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A model directory: its family by model_type, and the shape that config.json gives it.

    cfg.vocab_size is the number of the embedding's rows; a tokenizer may know fewer ids: put its number there with
    dataclasses.replace, and the rows beyond it are never sampled, but kept.
    """

    directory: pathlib.Path
    family: str
    cfg: ModelConfig
    stop_ids: tuple[int, ...]  # eos_token_id of generation_config.json, else of config.json; empty if neither has it
    labels: int  # 1 for a reward model, which has a score head instead of a language-model head; else 0
    context: int = 0  # positions that it was made for; 0: config.json doesn't say
    normal: tuple[float, float] = (0.0, 1.0)  # mean and scale of a reward model's scores on its training responses


def read(directory: str | pathlib.Path) -> HFModel:
    """Reads config.json and generation_config.json; raises where the model isn't one that can be computed here.

    A config.json that says that the head is the embedding is believed as far as the files hold no other head.
    """
    directory = pathlib.Path(directory)
    if not is_file(directory / "config.json"):
        raise UserError(
            f"model {directory}: no config.json there, wanted a directory with a model of Hugging Face's form"
        )
    values = read_json(directory / "config.json")
    text = text_config(values)
    labels = _labels(values)
    name = values.text("model_type")
    known = family(values.where, name)
    # Before anything is made of a size: all else is compared with the weights when they are read.
    there, count = layers(directory, known.prefixes), text.size("num_hidden_layers")
    if there is not None and count > there:
        raise text.error("num_hidden_layers", f"the {there} that the weights beside it have")
    cfg = model_config(text, known, labels)
    if cfg.tied and not labels and has_weights(directory):
        stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in weight_files(directory))
        cfg = dataclasses.replace(cfg, tied=not _has_another_head(directory, name, stamps))
    context = text.integer("max_position_embeddings", 0)
    normal = values.number(MEAN, 0.0), values.positive(SCALE, 1.0)
    return HFModel(directory, name, cfg, _stop_ids(directory, values, text), labels, context, normal)


def is_reward(directory: pathlib.Path) -> bool:
    """Whether config.json says that the model is a reward model; what is wrong with a broken one is for `read` to say."""
    with contextlib.suppress(UserError):
        return any(name.endswith(REWARD) for name in read_json(directory / "config.json").texts("architectures")[:1])
    return False


def text_config(values: Values) -> Values:
    """config.json, or the part of it about the language model where there is more."""
    if "text_config" not in values.entries:
        return values
    values.require({"tie_word_embeddings": True})
    return values.section("text_config")


@functools.lru_cache(maxsize=64)
def _has_another_head(directory: pathlib.Path, model_type: str, stamps: tuple) -> bool:
    """Whether the files hold a head that isn't the embedding. The comparison reads both, so that it is made once for files that
    nobody writes to (`stamps`)."""
    del stamps
    rules = FAMILIES[model_type]
    with open_tensors(directory) as tensors:
        heads = [tensors[f"{name}.weight"] for name in rules.heads if f"{name}.weight" in tensors]
        names = [f"{prefix}{rules.embedding}.weight" for prefix in rules.prefixes]
        embeddings = [tensors[name] for name in names if name in tensors]
        if not heads or not embeddings:
            return False
        head, embedding = heads[0], embeddings[0]
        if head.shape != embedding.shape:
            return True  # which the check of all shapes then names
        for start in range(0, head.shape[0], ROWS):
            region = (slice(start, min(start + ROWS, head.shape[0])),)
            rows = [each.read(region).astype(np.float32) for each in (head, embedding)]
            if not np.array_equal(*rows, equal_nan=True):
                return True
        return False


def abstract_params(cfg: ModelConfig, labels: int) -> PyTree:
    """Shapes of the parameters: the transformer's, and a reward model's score head [1, D]."""
    tree = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
    return tree | {"score": jax.ShapeDtypeStruct((1, cfg.width), "float32")} if labels else tree


def _labels(values: Values) -> int:
    architectures = values.texts("architectures")
    name = architectures[0] if architectures else LANGUAGE[0]
    if name.endswith(LANGUAGE):
        return 0
    if not name.endswith(REWARD):
        raise values.error("architectures", f"one that ends with {', '.join(LANGUAGE)} or {REWARD}")
    # transformers keeps the number of labels as the length of this table; without it there are two.
    count = len(values.section("id2label").entries) or values.integer("num_labels", 2)
    if count != 1:
        raise UserError(f"{values.where}: {name} with {count} labels (id2label), wanted one: a reward model")
    return 1


def _stop_ids(directory: pathlib.Path, *configs: Values) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    for values in ((read_json(generation),) if is_file(generation) else ()) + configs:
        found = values.entries.get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(each) is int and each >= 0 for each in ids):
            raise values.error("eos_token_id", "an id or a list of ids")
        return tuple(ids)
    return ()
