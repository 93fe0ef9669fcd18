"""Writes a run's model, LoRA's additions merged, as a Hugging Face directory: config, safetensors and tokenizer.

    python -m oaif_jax.export --workdir=runs/online_dpo --out=exported --dtype=float32

The directory is one that transformers and others load. --form=adapter writes LoRA's additions alone, which peft loads.
"""

import dataclasses
import pathlib

from absl import flags

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_workdir()
    options.define("out", None, options.DIR, "the directory to write, which isn't there yet", required=True)
    dtypes = "of the parameters; bfloat16 can't hold small changes, and the share that is lost is printed"
    options.define("dtype", "float32", options.choice(("float32", "bfloat16")), dtypes)
    options.define("form", "merged", options.choice(("merged", "adapter")), "one model, or LoRA's additions for peft")
    cli.define_checkpoint()
    cli.parse()
    cli.import_jax()

from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax.base.files import no_url
from oaif_jax.base.mirror import shown
from oaif_jax.data.chat import TEMPLATE_FILE
from oaif_jax.data.special_tokens import CONFIG
from oaif_jax.run.setup import stored_model
from oaif_jax.stored import hf
from oaif_jax.stored.open import Model


def check(model: Model) -> hf.HFModel:
    """The directory that an export will look like; UserError where there is none."""
    if model.directory is None:
        raise UserError("export: the model didn't come from a Hugging Face directory, wanted policy.init=hf")
    return model.directory


@phase("exporting")
def save(model: Model, params: PyTree, directory: pathlib.Path, dtype: str) -> str:
    """Writes trained parameters, with a base's where there is one; `dtype` is float32 or bfloat16. Returns what to say of it."""
    source, voice = check(model), model.voice
    own = (source.directory / TEMPLATE_FILE, source.directory / CONFIG)
    chat = hf.Chat(voice.stop_ids, "" if voice.chat.path in own else voice.chat.source)
    if model.is_reward:
        source, (pad_id, pad_token) = dataclasses.replace(source, normal=model.normal), padding(model)
        chat = dataclasses.replace(chat, pad_id=pad_id, pad_token=pad_token)
    lost = hf.save(directory, model.merged(params), model.cfg, source, dtype, chat)
    if dtype == "float32":
        return f"exported to {shown(directory)}"
    return (
        f"exported to {shown(directory)}; {dtype} can't hold {lost:.1%} of what training changed (float32 holds it all)"
    )


def padding(model: Model) -> tuple[int | None, str]:
    """What transformers may pad a reward model's rows with, and its text: it reads the score at the last token that isn't this
    one, so that no stop token can be it. The tokenizer's own, else one with a meaning that ends nothing, else a row that no token
    has, which has no text; None if there is none of them."""
    tokenizer, stop_ids = model.voice.tokenizer, model.voice.stop_ids
    if tokenizer.pad_id not in stop_ids:
        return tokenizer.pad_id, ""
    named = {token: text for text, token in tokenizer.control.items()}
    others = [*sorted(named), *sorted(tokenizer.unused_ids), *range(tokenizer.vocab_size, model.cfg.rows)]
    found = next((each for each in others if each < model.cfg.rows and each not in stop_ids), None)
    return found, named.get(found, "") if found is not None else ""


@phase("exporting")
def save_adapter(model: Model, params: PyTree, directory: pathlib.Path) -> str:
    """Writes additions alone, as peft loads them. Returns what to say of it; UserError where there are none."""
    if model.base is None:
        raise UserError(
            "export: this run trained all parameters, not additions; wanted a run with policy.lora.rank above 0"
        )
    if model.is_reward:
        raise UserError("export: a reward model's head is no part of an adapter, wanted the merged model instead")
    source = check(model)
    hf.save_adapter(directory, params["lora"], model.cfg, source)
    said = f"adapter written to {shown(directory)}, for peft and the model {source.directory}"
    return f"{said}, in the few bits that it was trained on" if "scales" in model.base else said


def load(model: Model, directory: pathlib.Path, mesh: Mesh, dtype: str) -> PyTree:
    """What was exported of a model, all of it in one tree, to be measured as the model was."""
    exported = hf.read(directory)
    return hf.load(
        dataclasses.replace(exported, cfg=dataclasses.replace(model.cfg, tied=exported.cfg.tied)), mesh, dtype
    )


def run(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    dtype: str = "float32",
    which: str = "best",
    form: str = "merged",
) -> str:
    """Writes checkpoint `which` (best, last or a step) of a run to the directory `out`, as one model or (form="adapter") as
    additions. Returns what to say of it."""
    no_url(out)
    if pathlib.Path(out).exists():
        raise UserError(f"--out={out} is there already, wanted a directory that isn't")
    _, _, model = stored_model(workdir, which)
    if form == "adapter":
        return save_adapter(model, model.params, pathlib.Path(out))
    return save(model, model.params, pathlib.Path(out), dtype)


def main() -> None:
    """Exports what the command line asks for."""
    given = flags.FLAGS
    print(run(given.workdir, given.out, dtype=given.dtype, which=given.checkpoint, form=given.form))


if __name__ == "__main__":
    cli.call(main)
