"""Where a model comes from, and what can be said of it before its parameters are read: its directory, its run's config, its
shape, its tokenizer and chat template."""

import dataclasses
import pathlib

from oaif_jax import config
from oaif_jax.base.bucket import is_url
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_dir, is_file, no_url
from oaif_jax.base.mirror import local, shown
from oaif_jax.config import Config
from oaif_jax.data.chat import open_template
from oaif_jax.data.tokenizer import open_tokenizer
from oaif_jax.data.voice import Voice
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored import gguf, hf, single
from oaif_jax.tiny.data import asset, plain_voice, policy_voice

WANTED = "wanted tiny:NAME, hf, scratch, or WORKDIR[@best | @last | @STEP]"
POLICY = "policy"  # the key of the model that a run trains


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from: what `config.KEY.init` and `config.KEY.path` say."""

    key: str
    init: str
    path: str

    def __str__(self) -> str:
        return f"config.{self.key}.path={self.path!r}" if self.init == "hf" else f"config.{self.key}.init={self.init!r}"


def source_of(key: str, section) -> Source:
    """Of a section of the config with `init` and `path`."""
    return Source(key, section.init, section.path)


def origin(source: Source) -> Source | None:
    """The source with a path that a model came from, through any number of runs; None in the tiny world."""
    if source.init == "hf":
        return source
    if source.init == "scratch" or source.init.startswith("tiny:"):
        return None
    return origin(source_of(POLICY, run_config(source).policy))


def home(source: Source) -> pathlib.Path | None:
    """The Hugging Face directory that a model came from, through any number of runs; None in the tiny world. A GGUF file is
    converted into one."""
    first = origin(source)
    if first is None:
        return None
    if file := gguf_of(first):
        try:
            return gguf.directory(file)
        except UserError as error:
            raise UserError(f"{first}: {error}") from error
    if not first.path or not is_dir(pathlib.Path(first.path)):
        raise UserError(
            f"{first}: no such directory, wanted one with config.json, safetensors and a tokenizer, or a .gguf file"
        )
    return pathlib.Path(first.path)


def gguf_of(source: Source) -> pathlib.Path | None:
    """The GGUF file that a source with a path names; None where that is a directory."""
    return pathlib.Path(source.path) if source.init == "hf" and gguf.is_gguf(source.path) else None


def is_reward(source: Source) -> bool:
    """Whether a source names a reward model: a directory of one, or a run of the method that makes them."""
    if source.init == "hf":
        directory = home(source)
        assert directory is not None
        return hf.is_reward(directory)
    is_run = source.init != "scratch" and not source.init.startswith("tiny:")
    return is_run and run_config(source).makes_reward_model


def chat_of(source: Source, chat: str, arguments: str = "") -> tuple[str, str]:
    """A model's chat template as `open_template` takes it, and what that is told; "auto" is, of a run, what that run was trained
    with."""
    if chat != "auto" or source.init in ("hf", "scratch") or source.init.startswith("tiny:"):
        return chat, arguments
    before = run_config(source).policy
    return chat_of(source_of(POLICY, before), before.chat, arguments or before.chat_args)


def voice_of(source: Source, chat: str, arguments: str = "") -> Voice:
    """A model's voice: of a directory with the chat template that `chat` names, and what it is told beside messages; the tiny
    world has two of its own."""
    directory = home(source)
    if directory is None:
        if arguments:
            raise UserError(f"config.{source.key}.chat_args={arguments!r}: {source} has no chat template, wanted none")
        reads_as_policy = source.key in (POLICY, "reference") or is_reward(source)
        return policy_voice() if reads_as_policy else plain_voice()
    model = hf.read(directory)
    tokenizer = open_tokenizer(directory, model.cfg.rows)
    chat, arguments = chat_of(source, chat, arguments)
    try:
        template = open_template(tokenizer, chat, arguments=arguments)
        tokenizer = tokenizer.with_control(template.framing(tokenizer))
        turn_end = template.turn_end(tokenizer)
    except UserError as error:
        given = f", config.{source.key}.chat_args={arguments!r}" if arguments else ""
        raise UserError(f"config.{source.key}.chat={chat!r}{given}: {error}") from error
    ends = [*tokenizer.stop_ids, *model.stop_ids]
    # What an answer in a chat ends with comes first: it is what responses from files are given.
    ends = ends if turn_end is None else [turn_end, *ends]
    ends = [token for token in dict.fromkeys(ends) if token < model.cfg.rows]
    return Voice(tokenizer, template, tuple(ends), spaced=not template.source)


def shape_of(source: Source, vocab_size: int, shape: config.Shape | None = None) -> ModelConfig:
    """The shape of the model that `source` names, without its parameters; `vocab_size` and `shape` are for one from scratch."""
    if source.init == "scratch":
        if shape is None:
            raise UserError(f"{source}: wanted a trained model (tiny:NAME, hf or a run's workdir)")
        return ModelConfig(vocab_size=vocab_size, **dataclasses.asdict(shape))
    if source.init == "hf":
        directory = home(source)
        assert directory is not None
        return hf.read(directory).cfg
    if source.init.startswith("tiny:"):
        return single.shape(asset(source.init.removeprefix("tiny:")))
    policy = run_config(source).policy
    return shape_of(source_of(POLICY, policy), vocab_size, policy.shape)


# ------------------------------------------------------------------------------------------------ other runs


def run_of(source: Source) -> tuple[pathlib.Path, str]:
    """The run that a source names, and which of its checkpoints; a workdir may have an @ in its path.

    In: "runs/sft@40", "runs/sft" -> Out: ("runs/sft", "40"), ("runs/sft", "best"). Of a run in a bucket: a mirror's directory.
    """
    if is_url(source.init):
        parent, _, name = source.init.rpartition("/")
        name, _, which = name.partition("@")
        return local(f"{parent}/{name}"), which or "best"
    no_url(source.init, WANTED)
    workdir, _, which = source.init.rpartition("@")
    is_whole = not workdir or (pathlib.Path(source.init) / "config.json").is_file()
    return (pathlib.Path(source.init), "best") if is_whole else (pathlib.Path(workdir), which or "best")


def run_config(source: Source) -> Config:
    """The config of the run that a source names."""
    workdir, _ = run_of(source)
    path = workdir / "config.json"
    if not is_dir(workdir / "checkpoints") or not is_file(path):
        raise UserError(f"{source}: no run there ({shown(workdir / 'checkpoints')} doesn't exist), {WANTED}")
    return config.read(path)[0]


def checkpoint_step(source: Source) -> int:
    """The checkpoint's step that `read_run` found."""
    return int(source.init.rpartition("@")[2])
