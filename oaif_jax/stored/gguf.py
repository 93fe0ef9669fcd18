"""A GGUF file as a Hugging Face directory, which is made once and kept in the user's cache.

    ~/.cache/oaif_jax/models/SHA256-RULE      ($XDG_CACHE_HOME in place of ~/.cache, where it is set)

transformers reads the file (pip install -c constraints.txt '.[real]'): the weights, the tokenizer and the chat template in it.
What is written is float32 in safetensors: all that the file's few bits hold. A directory that nobody opened for a month goes when
another one is made.

transformers passes over what it doesn't know of in a file: scaled rotary positions, windows, soft caps, tensors. Here the file's
own words go into config.json, and a file is refused that says more than is read.
"""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import numpy as np
import safetensors

from oaif_jax.base import files
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

MAGIC = b"GGUF"
FORM = 1  # another one where a conversion would write something else than it did
KEPT = 30 * 24 * 3600  # seconds after which a directory that wasn't opened may go
ORIGIN = "gguf.json"  # in such a directory: which file it was, and what read it

# general.architecture -> what its keys say beside COMMON.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (),
    "qwen2": (),
    "qwen3": (),
    "phi3": ("attention.sliding_window",),
    "gemma2": ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": (
        "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa",
    ),
}  # fmt: skip
NEEDED = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
COMMON = (
    *NEEDED, "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)  # fmt: skip
# Layers of the Gemmas whose queries are scaled by width / heads: the file doesn't say it, and llama.cpp goes by the layers, too.
BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
ROPE_FREQS = "rope_freqs.weight"  # by what each rotary frequency is divided
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # of all its versions


# By tokenizer.ggml.pre, how a byte-level tokenizer cuts a text before it merges: transformers takes any other for GPT-2's.
CUTS = ("default", "gpt-2", "smollm", "llama3", "llama-v3", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken")


def is_gguf(path: str | pathlib.Path) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return pathlib.Path(path).suffix.lower() == ".gguf" and not files.is_dir(pathlib.Path(path))


def directory(file: pathlib.Path) -> pathlib.Path:
    """The directory that a GGUF file is converted into, by the SHA-256 of what it holds and the rule of the conversion; UserError
    as of `convert`."""
    if not files.is_file(file):
        raise UserError(f"{file}: no such file, wanted one in GGUF")
    with phase(f"hashing {file.name}"):
        sha256, _ = files.digest_once(file)
    try:
        place = files.user_cache() / "models"
        made = place / f"{sha256[:32]}-{rule()}"
        place.mkdir(parents=True, exist_ok=True)
        is_ours = os.access(place, os.W_OK)
        with (place / "lock").open(
            "a" if is_ours else "r"
        ) as lock:  # another process may make the same model, or forget it
            fcntl.flock(lock, fcntl.LOCK_EX if is_ours else fcntl.LOCK_SH)
            if made.is_dir():
                with contextlib.suppress(OSError):  # somebody else's cache
                    os.utime(made)
            else:
                _forget(place)
                convert(file, made)
    except (OSError, RuntimeError) as error:
        said = files.reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{file} can't be converted in the cache ({said}); wanted XDG_CACHE_HOME=DIR with room for it, or "
            f"python -m launch.from_gguf --file={file} --out=DIR"
        ) from error
    return made


def rule() -> str:
    """What the numbers depend on beside the file: what this version makes of it, and transformers, "none" where there is none."""
    try:
        return f"{FORM}-{metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        return f"{FORM}-none"


def _forget(place: pathlib.Path) -> None:
    """Removes what nobody opened for long, and what a kill left half."""
    for each in place.iterdir():
        if each.is_dir() and time.time() - each.stat().st_mtime > KEPT:
            shutil.rmtree(each, ignore_errors=True)


def convert(file: pathlib.Path, out: pathlib.Path) -> None:
    """Writes `out`, as a whole or not at all; UserError for a file that transformers can't read or that holds what isn't read
    here, and without the extra."""
    if out.exists():
        raise UserError(f"{out} is there already, wanted a directory that isn't")
    if not files.is_file(file):
        raise UserError(f"{file}: no such file, wanted one in GGUF")
    try:
        with files.open_file(file) as opened:
            begins = opened.read(len(MAGIC))
    except OSError as error:
        raise files.unreadable(file, error) from error
    if begins != MAGIC:
        raise UserError(f"{file} begins with {begins!r}, wanted {MAGIC!r}, as every GGUF file does")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        phase(f"converting {file.name}"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}", ignore_cleanup_errors=True) as there,
    ):
        made = pathlib.Path(there) / out.name
        _write(file, made)
        origin = {"file": str(file.absolute()), "sha256": files.digest_once(file)[0]}
        (made / ORIGIN).write_text(
            json.dumps(origin | {"transformers": metadata.version("transformers")}, indent=2) + "\n"
        )
        for path in made.iterdir():
            files.as_umask(path)
            files.fsync(path)
        files.fsync(made)
        made.rename(out)
        files.fsync(out.parent)


def _write(file: pathlib.Path, made: pathlib.Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # all that is wanted is in the file
    try:
        import accelerate  # noqa: F401 - transformers reads with it
        import gguf  # noqa: F401
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"{file} is read by transformers: there is no {error.name}, wanted pip install -c constraints.txt '.[real]'"
        ) from error
    link = made.with_name(f".{made.name}") / file.name  # transformers looks at what lies beside a file
    link.parent.mkdir()
    link.symlink_to(file.absolute())
    with _quiet(transformers):
        try:
            model, tokenizer = _read(file, link)
        except UserError:
            raise
        except Exception as error:  # of whatever kind a file that is no model raises there
            first = str(error).strip().splitlines()[:1] or [""]
            raise UserError(f"transformers can't read {file} ({type(error).__name__}: {first[0]})") from error
        try:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        except (OSError, safetensors.SafetensorError) as error:  # type: ignore[attr-defined]
            raise UserError(
                f"{made.name} can't be written beside {made.parent} ({error}), wanted room for it"
            ) from error


def _read(file: pathlib.Path, link: pathlib.Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer, by a link with nothing beside it; UserError for a file that says more than was read of
    it."""
    import gguf
    import torch
    import transformers

    place, of, found = link.parent, {"gguf_file": link.name}, gguf.GGUFReader(file)
    fields = {name: field.contents for name, field in found.fields.items()}
    architecture, said = _metadata(file, fields)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    freqs = np.array(tensors.pop(ROPE_FREQS).data, np.float64) if ROPE_FREQS in tensors else None
    config = transformers.AutoConfig.from_pretrained(place, **of)
    _configure(file, config, architecture, said, freqs)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):  # not those of a family's first model
        there = fields.get(f"tokenizer.ggml.{key}_token_id")
        setattr(config, f"{name}_token_id", there and there())
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, **of)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=torch.float32, output_loading_info=True, **of
    )
    model, info = loaded
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, said["block_count"])
    known = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in model.state_dict()}
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{file}: there is no tensor for {missing[0]}, wanted a whole model of {architecture}")
    if unread := sorted(tensors.keys() - known):
        raise UserError(f"{file}: tensor {unread[0]} has no place in transformers' {architecture}, wanted none such")
    # What came from GGUF isn't written by transformers: the same parameters without their origin.
    del model.config.quantization_config
    with torch.device("meta"):  # takes no memory
        plain = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain, tokenizer


def _metadata(file: pathlib.Path, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture, and its keys without its name before them; UserError for what isn't read here. `fields`: functions that
    give a key's value."""
    architecture = fields["general.architecture"]()
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file}: general.architecture is {architecture!r}, wanted one of {', '.join(ARCHITECTURES)}")
    if "split.count" in fields and fields["split.count"]() > 1:
        raise UserError(
            f"{file} is one of {fields['split.count']()} parts of a model, wanted them merged into one file"
        )
    model, cut = (
        fields[f"tokenizer.ggml.{key}"]() if f"tokenizer.ggml.{key}" in fields else "" for key in ("model", "pre")
    )
    if model == "gpt2" and cut and cut not in CUTS:
        raise UserError(f"{file}: tokenizer.ggml.pre is {cut!r}, wanted one of {', '.join(CUTS)}")
    prefix = f"{architecture}."
    said = {name.removeprefix(prefix): _short(value()) for name, value in fields.items() if name.startswith(prefix)}
    for key in NEEDED:
        if key not in said:
            raise UserError(f"{file}: {prefix}{key} isn't there, wanted it")
    for key, value in said.items():
        if key not in (*COMMON, *ARCHITECTURES[architecture]):
            raise UserError(f"{file}: {prefix}{key} is {value!r}, wanted none such: it isn't read")
    return architecture, said


def _short(value: Any) -> Any:
    """In: the float32 nearest to 1e-6, as a file has it. Out: 1e-6, as config.json had it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _configure(
    file: pathlib.Path, config: Any, architecture: str, said: Mapping[str, Any], freqs: np.ndarray | None
) -> None:
    """Puts into transformers' config what a file says and transformers passes over, or takes for another model's default."""
    width, heads, layers = (said[key] for key in ("embedding_length", "attention.head_count", "block_count"))
    config.rms_norm_eps = said["attention.layer_norm_rms_epsilon"]
    config.num_key_value_heads = said.get("attention.head_count_kv", heads)
    config.head_dim = said.get("attention.key_length", width // heads)
    rotated = said.get("rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise UserError(f"{file}: rope.dimension_count is {rotated}, wanted all {config.head_dim} of a head")
    if architecture == "phi3":
        config.sliding_window = said.get("attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in said:
            setattr(config, key, said[key])
    if architecture.startswith("gemma"):
        by_width = (architecture, layers) in BY_WIDTH
        config.query_pre_attn_scalar = width // heads if by_width else config.head_dim
    rope = _rope(file, said, freqs, config.head_dim)
    if architecture == "gemma3":  # its local layers are never scaled
        local = {"rope_type": "default", "rope_theta": said.get("rope.freq_base_swa", 10_000.0)}
        config.rope_parameters = {"full_attention": rope, "sliding_attention": local}
    else:
        config.rope_parameters = {**config.rope_parameters, **rope}


def _rope(file: pathlib.Path, said: Mapping[str, Any], freqs: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    """transformers' rope_parameters."""
    theta, kind = said.get("rope.freq_base", 10_000.0), said.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UserError(f"{file}: rope.scaling.type is {kind!r}, wanted none or linear")
    if freqs is None:
        linear = {"rope_type": "linear", "factor": said.get("rope.scaling.factor", 1.0)}
        return {"rope_theta": theta, **(linear if kind == "linear" else {"rope_type": "default"})}
    factor = float(freqs.max())
    if (
        kind != "none"
        or freqs.shape != (head_dim // 2,)
        or not np.allclose(freqs, _llama3(theta, factor, head_dim), 1e-4)
    ):
        raise UserError(f"{file}: {ROPE_FREQS} isn't as Llama 3 scales rotary positions, wanted none or that")
    return {"rope_theta": theta, "rope_type": "llama3", "factor": round(factor, 3), **LLAMA3}


def _llama3(theta: float, factor: float, head_dim: int) -> np.ndarray:
    """By what Llama 3 divides the rotary frequencies, [H / 2]: 1 for short waves, `factor` for long ones, and between."""
    turns = LLAMA3["original_max_position_embeddings"] / (2 * np.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / factor + kept)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the progress bars and warnings of libraries; errors come as exceptions."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)
