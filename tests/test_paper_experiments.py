"""The papers' experiments: their numbers, and their steps at full size, traced from shapes alone."""

import dataclasses
import functools
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_readers
from jax import ShapeDtypeStruct as Shape
from test_hf_config import count, place

from oaif_jax import config, step, supervised, tasks, train
from oaif_jax.annotate.llm import Template
from oaif_jax.annotate.prompts import KNOWN
from oaif_jax.base import cli
from oaif_jax.config import Config
from oaif_jax.data import readers, records
from oaif_jax.evals import preference
from oaif_jax.models import sharding
from oaif_jax.stored import hf
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.tasks import base
from oaif_jax.tasks.data import USES
from oaif_jax.update import optim, state
from oaif_jax.update.state import TrainState

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent / "experiments"
DEVICES = 16  # that a file's mesh is for, or a multiple of that

# Model -> how many parameters it has, as its page says or its files sum up to.
TOTALS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "pythia-1b": 1_011_781_632,
    "zephyr-7b": 7_241_732_096,
    "llama-3-8b": 8_030_261_248,
    "phi-3-mini-4k": 3_821_079_552,
}

# --- papers.md's numbers, by key of the config

LOSSES = {"dpo": ("dpo", 0.1), "ipo": ("ipo_mean", 1.0), "slic": ("slic", 0.002)}  # of OAIF: name, beta
ASKED = {"tldr": ("tldr", "tldr"), "helpful": ("helpful", "helpful_judge"), "harmless": ("harmless", "harmless_judge")}
ADAFACTOR = {"optimizer.name": "adafactor", "data.batch": 128, "sample.temperature": 0.9}
OAIF = ADAFACTOR | {"optimizer.lr": 5e-7, "optimizer.warmup": 150}
SFT = ADAFACTOR | {"optimizer.lr": 1e-5, "method": "sft", "steps": 912}
SELM = {
    "method": "offline", "loss.name": "dpo", "loss.beta": 0.01, "seed": 42, "optimizer.name": "adamw",
    "optimizer.schedule": "cosine", "data.prompt_tokens": 512, "data.response_tokens": 512, "compute.dtype": "bfloat16",
}  # fmt: skip
FIRST = {"selm_zephyr": (4, 256, 60, 6), "selm_llama3": (3, 128, 160, 16), "selm_phi3": (3, 128, 160, 16)}
RATES = {"selm_zephyr": (5e-7, 5e-7, 5e-7, 1e-7), "selm_llama3": (5e-7, 3e-7, 1e-7), "selm_phi3": (5e-7, 3e-7, 1e-7)}
ALPHA = {"selm_zephyr": 0.001, "selm_llama3": 0.0001, "selm_phi3": 0.001}


def grid() -> dict[str, dict]:
    """OAIF's 18 files."""
    found = {}
    for task, (instruction, asked) in ASKED.items():
        for method in ("online", "offline"):
            for name, (loss, beta) in LOSSES.items():
                found[f"oaif_{task}_{method}_{name}"] = OAIF | {
                    "method": method,
                    "loss.name": loss,
                    "loss.beta": beta,
                    "annotator.instruction": instruction,
                    "judge.instruction": asked,
                }
    return found


NUMBERS = grid()
PYTHIA = {"data.prompt_tokens": 512, "data.response_tokens": 53}
NUMBERS |= {
    **{f"oaif_{task}_online_dpo_27b": NUMBERS[f"oaif_{task}_online_dpo"] for task in ASKED},
    "oaif_tldr_sft": SFT,
    "pythia_tldr_sft": SFT | PYTHIA,
    "pythia_tldr_online_dpo": NUMBERS["oaif_tldr_online_dpo"] | PYTHIA,
    "pythia_tldr_offline_dpo": NUMBERS["oaif_tldr_offline_dpo"] | PYTHIA,
}
NUMBERS |= {
    stem: SELM
    | {
        "data.batch": batch,
        "data.train_posts": 61_135 // portions,
        "steps": steps,
        "optimizer.warmup": warmup,
        "optimizer.lr": RATES[stem][0],
    }
    for stem, (portions, batch, steps, warmup) in FIRST.items()
}
POLICIES = {"selm_zephyr": "zephyr-7b", "selm_llama3": "llama-3-8b", "selm_phi3": "phi-3-mini-4k"}

each_file = pytest.mark.parametrize("stem", sorted(NUMBERS))


@functools.cache
def parsed(stem: str) -> Config:
    return config.parse(cli.load_config(str(EXPERIMENTS / f"{stem}.py")).to_dict())


def policy_of(stem: str) -> str:
    return POLICIES.get(stem, "pythia-1b" if stem.startswith("pythia") else "gemma-2-2b")


def annotator_of(stem: str) -> str:
    """The annotator of an online run, "" of the others."""
    return "" if parsed(stem).method != "online" else "gemma-2-27b" if stem.endswith("27b") else "gemma-2-9b"


# --- what the files say


def test_files():
    shared = {"oaif", "selm"}
    there = {path.stem for kind in ("oaif*", "pythia*", "selm*") for path in EXPERIMENTS.glob(f"{kind}.py")}
    assert there == set(NUMBERS) | shared
    assert len(grid()) == 18


@each_file
def test_numbers_of_the_paper(stem):
    said = config.flatten(parsed(stem))
    assert {key: said[key] for key in NUMBERS[stem]} == NUMBERS[stem]


@each_file
def test_what_is_done_alike(stem):
    """Trained in float32, since 5e-7 doesn't move a bfloat16 weight; and no part of the tiny world is left."""
    cfg = parsed(stem)
    assert (cfg.compute.trained, cfg.compute.frozen, cfg.compute.dtype) == ("float32", "bfloat16", "bfloat16")
    assert not cfg.optimizer.scale_by_parameters
    used = [cfg.policy.init, cfg.data.name]
    used += [] if cfg.method == "sft" else [cfg.judge.init]
    used += [cfg.annotator.init, cfg.annotator.instruction] if cfg.method == "online" else []
    assert not [name for name in used if name.startswith("tiny")]
    assert cfg.method != "online" or {cfg.annotator.instruction, cfg.judge.instruction} <= set(KNOWN)


@pytest.mark.parametrize(
    ("online", "offline"),
    [(stem, stem.replace("online", "offline")) for stem in sorted(NUMBERS) if "online" in stem and "27b" not in stem],
)
def test_online_and_offline_differ_in_the_method_only(online, offline):
    ours, theirs = (config.flatten(parsed(stem)) for stem in (online, offline))
    assert {key for key in ours if ours[key] != theirs[key]} == {"method"}


@pytest.mark.parametrize("stem", sorted(FIRST))
def test_stages(stem):
    """As the paper's table has them: one portion each, and the run is the first."""
    stages = runpy.run_path(str(EXPERIMENTS / f"{stem}.py"))["STAGES"]
    assert tuple(stage["lr"] for stage in stages) == RATES[stem]
    assert [stage["portion"] for stage in stages] == list(range(FIRST[stem][0]))
    bonus = [stage for stage in stages if stage["loss"] == "selm"]
    assert [stage["iteration"] for stage in bonus] == [1, 2, 3]
    assert {stage["alpha"] for stage in bonus} == {ALPHA[stem]}
    assert [stage for stage in stages if stage not in bonus] == (
        [{"iteration": 0, "loss": "dpo", "lr": 5e-7, "alpha": 0.0, "portion": 0}] if stem == "selm_zephyr" else []
    )
    assert parsed(stem).optimizer.lr == stages[0]["lr"]


@each_file
def test_command_is_complete(stem):
    """Each directory that a run reads is in its command, as a word in capitals, and nothing else is."""
    cfg = parsed(stem)
    text = runpy.run_path(str(EXPERIMENTS / f"{stem}.py"))["__doc__"].split("\n\n")[1]
    given = dict(re.findall(r"--config\.(\S+)=(\S+)", text))
    needed = {"policy.path", "data.path"}
    needed |= {"annotator.path"} if cfg.method == "online" else set()
    needed |= {"judge.path"} if cfg.method != "sft" and cfg.judge.init == "hf" else set()
    assert set(given) == needed
    assert all(re.match(r"[A-Z][A-Z0-9_]+(/|$)", value) for value in given.values())
    loaded = cli.load_config(str(EXPERIMENTS / f"{stem}.py"))
    cli.override(loaded, given)
    assert config.flatten(config.parse(loaded.to_dict())) == config.flatten(cfg) | given


@pytest.mark.parametrize("stem", [stem for stem in sorted(NUMBERS) if stem.endswith(("dpo", "sft")) or "selm" in stem])
def test_data_are_there(stem, tmp_path):
    """The splits are those of the original files, and hold what the method needs."""
    cfg = parsed(stem)
    folder = {
        "tldr_posts": lambda: test_readers.write_tldr(tmp_path) / "tldr_3_filtered",
        "tldr_comparisons": lambda: test_readers.write_tldr(tmp_path) / "comparisons",
        "hh": lambda: test_readers.write_hh(tmp_path) / f"{cfg.annotator.instruction}-base",
        "ultrafeedback": lambda: test_readers.write_ultrafeedback(tmp_path),
    }[cfg.data.name]()
    for split in {cfg.data.train, cfg.data.validation, cfg.data.test} - {""}:
        loaded = readers.read(cfg.data.name, folder, split, "skip")
        assert records.use_as(loaded, USES[cfg.method]).examples


# --- the steps, at full size


@functools.cache
def mesh(data: int, fsdp: int, tensor: int):
    """For shardings: each device stands for several, since there are eight."""
    devices = jax.devices()
    assert len(devices) < DEVICES
    return sharding.make_mesh(data, fsdp, tensor, devices * (DEVICES // len(devices)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Name -> the model of a released config.json."""
    return functools.cache(lambda name: hf.read(place(tmp_path_factory.mktemp(name), f"{name}.released")))


def params_of(found: hf.HFModel, dtype: str):
    return jax.tree.map(lambda leaf: Shape(leaf.shape, dtype), abstract_params(found.cfg, 0))


@pytest.mark.parametrize("name", TOTALS)
def test_sizes(model, name):
    assert count(model(name)) == TOTALS[name]


@each_file
def test_mesh_divides_models_and_batches(model, stem):
    cfg = parsed(stem)
    on = mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    for name in {policy_of(stem), annotator_of(stem)} - {""}:
        shardings = sharding.param_shardings(params_of(model(name), "float32"), on)
        parts = {sharding.path_name(path): one.spec for path, one in jax.tree_util.tree_leaves_with_path(shardings)}
        assert all({"fsdp", "tensor"} <= set(spec) for at, spec in parts.items() if not at.endswith(("scale", "bias")))
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, on)
    tasks.check_evaluation(cfg, on)


def test_a_mesh_that_does_not_divide(model):
    """The check above can fail: the policy has 4 key/value heads, the annotator 8."""
    on = mesh(-1, 2, 8)
    sharding.param_shardings(params_of(model("gemma-2-9b"), "float32"), on)
    with pytest.raises(sharding.ShardingError, match="axis 1 doesn't divide by 8"):
        sharding.param_shardings(params_of(model("gemma-2-2b"), "float32"), on)


TEMPLATE = Template(first=(3,) * 12, second=(4,) * 12, closing=(5,) * 10, answers=(235274, 235284))


def batch_of(cfg: Config, *, fused: bool) -> dict[str, Shape]:
    """What the data give for a step; of a step that is taken apart, with what its first half adds."""
    rows, slots, tokens = cfg.data.batch, cfg.data.prompt_tokens, cfg.data.response_tokens
    branches = 1 if cfg.method == "sft" else 2
    found = {"prompts": Shape((rows, slots), np.int32), "prompt_valid": Shape((rows, slots), bool)}
    answers = {
        "responses": Shape((rows, branches, tokens), np.int32),
        "mask": Shape((rows, branches, tokens), bool),
    }
    if cfg.method == "sft":
        return found | answers
    if cfg.method == "offline":
        return found | answers | {"first_is_better": Shape((rows,), bool)}
    found["rows"] = Shape((rows,), np.int32)
    if fused:
        asked = (rows, slots + 200)  # with an instruction
        return found | {"questions": Shape(asked, np.int32), "question_valid": Shape(asked, bool)}
    return found | answers | {"finished": Shape((rows, 2), bool), "p_orders": Shape((rows, 2), np.float32)}


def is_fused(policy: hf.HFModel, annotator: hf.HFModel | None) -> bool:
    """Models of one family have one tokenizer."""
    return annotator is None or annotator.family == policy.family


def online_of(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel) -> step.OnlineObjective:
    sampler = base.sampler_of(cfg, policy.stop_ids, 0, cfg.sample.temperature)
    return step.OnlineObjective(pair_of(cfg, policy), sampler, annotator.cfg, TEMPLATE, cfg.annotator.missing_eos)


def pair_of(cfg: Config, policy: hf.HFModel) -> step.PairObjective:
    return step.PairObjective(cfg.loss.name, cfg.loss.beta, policy.cfg, policy.cfg, base.compute_of(cfg))


def objective_of(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel | None) -> step.Objective:
    """As the tasks make it."""
    if cfg.method == "sft":
        objective = supervised.SFTObjective(policy.cfg, base.compute_of(cfg))
        return functools.partial(supervised.sft, objective=objective)
    if annotator is None:
        return functools.partial(step.offline, objective=pair_of(cfg, policy))
    function = step.online if is_fused(policy, annotator) else step.annotated
    return functools.partial(function, objective=online_of(cfg, policy, annotator))


def state_of(cfg: Config, params) -> TrainState:
    tx = optim.optimizer(train.optimizer_config(cfg))
    return jax.eval_shape(lambda params: TrainState(jnp.array(0, jnp.int32), params, tx.init(params)), params)


def frozen_of(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel | None) -> dict:
    models = {} if cfg.method == "sft" else {"reference": policy}
    models |= {"annotator": annotator} if annotator else {}
    return {name: params_of(found, cfg.compute.frozen) for name, found in models.items()}


KEY = jax.eval_shape(lambda: jax.random.key(0))


SHAPING = ("batch", "prompt_tokens", "response_tokens")


def without_words(cfg: Config) -> Config:
    """What shapes don't depend on, the same for all: who is asked what about which data, and the loss."""
    alike = parsed("oaif_tldr_online_dpo")
    data = dataclasses.replace(alike.data, **{name: getattr(cfg.data, name) for name in SHAPING})
    return dataclasses.replace(cfg, annotator=alike.annotator, judge=alike.judge, loss=alike.loss, data=data)


@functools.cache
def traced(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel | None):
    """The state before a step, and what a step makes of it: shapes."""
    begin = state_of(cfg, params_of(policy, cfg.compute.trained))
    one_step = functools.partial(
        step.train_step,
        objective=objective_of(cfg, policy, annotator),
        tx=optim.optimizer(train.optimizer_config(cfg)),
        parts=cfg.optimizer.accumulate,
    )
    batch = batch_of(cfg, fused=is_fused(policy, annotator))
    return begin, jax.eval_shape(one_step, begin, frozen_of(cfg, policy, annotator), batch, KEY)


@each_file
def test_step_at_full_size(model, stem):
    """A step keeps every shape and type of the state."""
    cfg, policy, annotator = parsed(stem), model(policy_of(stem)), None
    if annotator_of(stem):
        annotator = model(annotator_of(stem))
    begin, (end, metrics, outputs) = traced(without_words(cfg), policy, annotator)
    assert jax.tree.structure(end) == jax.tree.structure(begin)
    assert jax.tree.leaves(end) == jax.tree.leaves(begin)
    assert {"loss", "grad_norm", "update_rms"} <= set(metrics)
    assert all(value.shape == () for value in metrics.values())
    if cfg.method == "online":
        assert outputs["responses"].shape == (cfg.data.batch, 2, cfg.data.response_tokens)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_full_size(model, name):
    """What `without_words` makes alike: a micro-batch's gradient under each of the paper's losses."""
    cfg, policy = parsed(f"oaif_tldr_offline_{name}"), model("gemma-2-2b")
    params = params_of(policy, cfg.compute.trained)
    part = jax.eval_shape(
        objective_of(cfg, policy, None), params, frozen_of(cfg, policy, None), batch_of(cfg, fused=True), KEY
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), part.gradients) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_what_runs_apart(model):
    """Pythia's responses, for all prompts at once, and Gemma's preference of their texts in its own tokens."""
    cfg = parsed("pythia_tldr_online_dpo")
    policy, annotator = model("pythia-1b"), model("gemma-2-9b")
    assert not is_fused(policy, annotator)
    batch = batch_of(cfg, fused=True)
    frozen = frozen_of(cfg, policy, annotator)
    params, at = params_of(policy, cfg.compute.trained), Shape((), np.int32)
    draw = functools.partial(step.draw_responses, objective=online_of(cfg, policy, annotator))
    drawn = jax.eval_shape(draw, params, frozen, batch, KEY, at)
    shape = (cfg.data.batch, 2, cfg.data.response_tokens)
    assert {name: made.shape for name, made in drawn.items()} == {
        "responses": shape, "mask": shape, "finished": shape[:2]
    }  # fmt: skip
    wide = (*shape[:2], 2 * shape[-1])  # room for a tokenizer that needs more
    asked = batch | {"responses": Shape(wide, np.int32), "mask": Shape(wide, bool)}
    compare = functools.partial(preference.compare, template=TEMPLATE, cfg=annotator.cfg, compute=base.compute_of(cfg))
    assert jax.eval_shape(compare, frozen["annotator"], asked).shape == shape[:2]


# --- memory


def bytes_on_a_device(tree, on) -> int:
    return sum(
        int(np.prod(one.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, one in zip(jax.tree.leaves(tree), jax.tree.leaves(on), strict=True)
    )


# Policy's file -> GB on each device of weights, moments, gradients and frozen models, as the shared files say.
RESIDENT = {
    "oaif_harmless_online_slic": 4.6,
    "oaif_tldr_online_dpo_27b": 6.86,
    "pythia_tldr_online_dpo": 3.2,
    "selm_zephyr": 9.96,
    "selm_llama3": 11.05,
    "selm_phi3": 5.26,
}


@pytest.mark.parametrize("stem", RESIDENT)
def test_memory(model, stem):
    """What lies on a device whatever the batch: the state, two gradients, reference, annotator, and a judge of 9B."""
    cfg, policy = parsed(stem), model(policy_of(stem))
    on = mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    params = params_of(policy, cfg.compute.trained)
    tx = optim.optimizer(train.optimizer_config(cfg))
    total = bytes_on_a_device(state_of(cfg, params), state.state_shardings(params, tx, on))
    total += 2 * bytes_on_a_device(params, sharding.param_shardings(params, on))
    judge = {} if cfg.judge.init == "none" else {"judge": params_of(model("gemma-2-9b"), cfg.compute.frozen)}
    frozen = frozen_of(cfg, policy, model(annotator_of(stem)) if annotator_of(stem) else None) | judge
    total += sum(bytes_on_a_device(each, sharding.param_shardings(each, on)) for each in frozen.values())
    assert total / 1e9 == pytest.approx(RESIDENT[stem], abs=0.05)
