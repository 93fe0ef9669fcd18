"""What a run is made of beside its config: instructions, chat templates, data, models, other runs' checkpoints. A path says
nothing of what lies there, so each is hashed into WORKDIR/inputs.json and compared at every start.

    {"annotator.instruction": {"kind": "instruction", "path": "mine.txt", "sha256": "...", "text": "inverted: false...",
                               "files": {"mine.txt": {"sha256": "...", "stamp": [size, mtime, ctime, inode]}}}, ...}

Keys are the config's, for data with the split's name behind it. A file whose stamp is as it was isn't read again.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder

from oaif_jax import config, methods
from oaif_jax.annotate import prompts, python
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import digest, digest_once, is_digested, read_json, stamp_of
from oaif_jax.base.mirror import shown
from oaif_jax.base.phases import phase
from oaif_jax.config import Config
from oaif_jax.data import chat, readers, special_tokens, splits, tokenizer
from oaif_jax.stored import gguf
from oaif_jax.stored.hf.tensors import INDEX, weight_files
from oaif_jax.stored.open import NORMAL
from oaif_jax.stored.reader import Reader
from oaif_jax.stored.source import (
    POLICY,
    Source,
    chat_of,
    gguf_of,
    home,
    is_reward,
    origin,
    run_config,
    run_of,
    source_of,
)
from oaif_jax.tiny import templates
from oaif_jax.tiny.data import asset, file_of, policy_voice

FILE = "inputs.json"
TEXTS = ("instruction", "chat template")  # kinds that are kept in full
# What is read of a model's directory beside its parameters, as far as it is there.
BESIDE = (
    "config.json", INDEX, *tokenizer.FILES, special_tokens.CONFIG, special_tokens.MAP, special_tokens.ADDED,
    special_tokens.GENERATION, chat.TEMPLATE_FILE,
)  # fmt: skip
# Who judges by the instructions of which of the tiny world's tasks.
TAUGHT = {
    "tiny:annotator": "tldr",
    "tiny:annotator_s": "tldr",
    "tiny:annotator_xs": "tldr",
    "tiny:judge": "tldr",
    "tiny:annotator_asked": "helpful",
    "tiny:judge_asked": "helpful",
}
LARGE = 5 * 10**8  # bytes that take about a second to hash
# What earlier versions didn't list: in a run of theirs, what there is now counts.
UNLISTED = tuple(f"data.name {name}" for name in templates.INSTRUCTIONS)
SHOWN = 80  # characters of a line
ANOTHER_RULE = (
    "the version that the run began with holds out other examples of these files than this one, and trains on others"
)

ANOTHER_CONVERSION = "another version of transformers, or of this project, has converted it for the run"

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class File:
    """A file's content, and what it is known by while nobody writes to it."""

    sha256: str
    stamp: tuple[int, ...]  # size, mtime, ctime (nobody can set it), inode


@dataclasses.dataclass(frozen=True)
class Input:
    """Something outside that a config names. `files` are named as they lie in it: that is the same on another machine."""

    kind: str  # model, run, data, pairs, tiny world, instruction, chat template, annotator
    path: str  # for people; of a run, the checkpoint's
    sha256: str
    text: str = ""
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Found:
    """An input before it is hashed: files by name, or the hash that stands for them."""

    kind: str
    path: pathlib.Path | str
    files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    rule: str = ""  # what this version makes of the files, where another one may make something else of them


@phase("hashing what the run is made of")
def of(
    cfg: Config, known: Mapping[str, Input] | None = None, say: Say | None = None, *, only: str = ""
) -> dict[str, Input]:
    """Every input of a config by its key, or those whose keys begin with `only`. `known` are inputs of an earlier start, by whose
    stamps files aren't read again.

    Files that are absent aren't listed. UserError, with the key, where that leaves it unclear which files there should be.
    """
    known = known or {}
    found = {key: each for key, each in _found(cfg) if key.startswith(only)}
    stamps = {key: {name: stamp_of(path) for name, path in each.files.items()} for key, each in found.items()}
    kept = {
        (key, name): file
        for key, each in known.items()
        for name, file in each.files.items()
        if stamps.get(key, {}).get(name) == file.stamp
    }
    unread = sum(
        stamp[0]
        for key, each in found.items()
        for name, stamp in stamps[key].items()
        if (key, name) not in kept and not is_digested(each.files[name], stamp)
    )
    if say is not None and unread > LARGE:
        say(f"hashing {unread / 1e9:.1f} GB of models and data, once: a later start reads what has changed since")
    return {
        key: _input(each, {name: kept.get((key, name)) or _file(path) for name, path in each.files.items()})
        for key, each in found.items()
    }


def _input(found: Found, files: dict[str, File]) -> Input:
    text = "".join(_text(path) for path in found.files.values()) if found.kind in TEXTS else ""
    sha256 = found.sha256 or _together(files)
    if found.rule:
        sha256 = hashlib.sha256(f"{found.rule}\n{sha256}\n".encode()).hexdigest()
    return Input(found.kind, str(found.path), sha256, text, files)


def _together(files: Mapping[str, File]) -> str:
    """The only file's hash, or one of all names and hashes."""
    if len(files) == 1:
        return next(iter(files.values())).sha256
    return hashlib.sha256("".join(f"{name} {files[name].sha256}\n" for name in sorted(files)).encode()).hexdigest()


def _file(path: pathlib.Path) -> File:
    return File(*digest_once(path))


def _text(path: pathlib.Path) -> str:
    """As it is: ends of lines and byte order marks are bytes, too."""
    return path.read_bytes().decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------ what a config names


def _found(cfg: Config) -> Iterator[tuple[str, Found]]:
    """The inputs that a run of this config uses, by key."""
    kind = methods.named(cfg.method)
    yield from _model(source_of(POLICY, cfg.policy), cfg.policy.chat)
    yield from _data(cfg, kind.reads)
    is_compared = kind.evaluation == "comparison"
    if (kind.has_reference or is_compared) and cfg.reference.init != "policy":
        yield from _model(source_of("reference", cfg.reference), "none")
    annotator = source_of("annotator", cfg.annotator)
    is_python = annotator.init.startswith(python.PREFIX)
    is_asked = kind.asks or (is_compared and cfg.judge.init == "annotator")
    scores = is_asked and not is_python and is_reward(annotator)  # and reads no instruction
    if is_python and is_asked:
        yield from _python("annotator", annotator.init)
    elif is_asked:
        yield from _model(annotator, cfg.annotator.chat)
        if not scores:
            yield _instruction("annotator", annotator, cfg.annotator.instruction)
    if not is_compared:
        return
    judge = source_of("judge", cfg.judge)
    if judge.init == "annotator" and not is_python and not scores:
        yield _instruction("judge", annotator, cfg.judge.instruction)
    elif judge.init.startswith(python.PREFIX):
        yield from _python("judge", judge.init)
    elif judge.init not in ("annotator", "none"):
        yield from _model(judge, cfg.judge.chat)
        yield _instruction("judge", judge, cfg.judge.instruction)


def _model(source: Source, template: str) -> Iterator[tuple[str, Found]]:
    """A model's files, and those of a chat template that the config names."""
    if source.init == "hf":
        directory = home(source)
        assert directory is not None
        file = gguf_of(source)
        yield (
            f"{source.key}.path",
            _file_alone(file) if file else Found("model", directory, _in_directory(source, directory)),
        )
    elif source.init.startswith("tiny:"):
        path = asset(source.init.removeprefix("tiny:"))
        yield f"{source.key}.init", Found("model", path, _there(path.parent, [path]))
    elif source.init != "scratch":
        yield f"{source.key}.init", _run(source)
        yield from _below(source)
    template, _ = chat_of(source, template) if home(source) is not None else ("none", "")
    if template not in ("auto", "none"):
        path = pathlib.Path(template)
        yield f"{source.key}.chat", Found("chat template", path, _there(path.parent, [path]))


def _file_alone(file: pathlib.Path) -> Found:
    """A model that is one file, and by what it is converted."""
    return Found("model", file, _there(file.parent, [file]), rule=gguf.rule())


def _in_directory(source: Source, directory: pathlib.Path) -> dict[str, pathlib.Path]:
    try:
        weights = weight_files(directory)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return _there(directory, [*(directory / name for name in BESIDE), *weights])


def _run(source: Source) -> Found:
    """The checkpoint that an init resolves to. Its manifest vouches for the files, and is checked when they are read."""
    run_config(source)  # there is a run
    workdir, which = run_of(source)
    reader = Reader(workdir / "checkpoints")
    try:
        step = reader.named(which)
        return Found("run", shown(workdir / "checkpoints" / str(step)), sha256=reader.sha256_of(step, "params"))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _below(source: Source) -> Iterator[tuple[str, Found]]:
    """What a run's checkpoint is read with: its directory's tokenizer and chat template; under LoRA all that its base is made of,
    which may be another run's."""
    first = source_of(POLICY, run_config(source).policy)
    directory, came_from = home(source), origin(source)
    if is_reward(source):
        workdir, _ = run_of(source)
        yield f"{source.key}.init scores", Found("model", shown(workdir), _there(workdir, [workdir / NORMAL]))
    if run_config(source).policy.lora.rank > 0:
        for key, found in _model(first, "none"):
            yield f"{source.key}.init base{key[len(key.partition(' ')[0]) :]}", found
    elif directory is not None and came_from is not None:
        file, beside = gguf_of(came_from), [directory / name for name in BESIDE]
        yield (
            f"{source.key}.init base",
            _file_alone(file) if file else Found("model", directory, _there(directory, beside)),
        )


def _instruction(key: str, asked: Source, name: str) -> tuple[str, Found]:
    """An instruction by name or path: models of the tiny world know that world's."""
    path = templates.path_of(name) if home(asked) is None else prompts.path_of(name)
    return f"{key}.instruction", Found("instruction", path, _there(path.parent, [path]))


def untaught(cfg: Config) -> tuple[str, ...]:
    """A warning where a model that learned to judge is asked by an instruction that it didn't learn: its trust was measured by
    others."""
    notes = []
    for key, asked in (
        ("annotator", "annotator"),
        ("judge", "annotator" if cfg.judge.init == "annotator" else "judge"),
    ):
        for each in of(cfg, only=f"{key}.instruction").values():
            source = source_of(asked, getattr(cfg, asked))
            learned = _learned(source)
            if learned and each.sha256 not in learned.values():
                is_one = len(learned) == 1
                notes.append(
                    f"{source} learned to judge by {', '.join(learned)}, and is asked by {each.path} "
                    f"(config.{key}.instruction): how far it can be trusted was measured by {'that' if is_one else 'those'} alone"
                )
    return tuple(notes)


def _learned(source: Source) -> dict[str, str]:
    """The instructions that a model learned to judge by, and their hashes; none where that isn't known."""
    if source.init in TAUGHT:
        return {name: digest(templates.path_of(name)) for name in templates.TASKS[TAUGHT[source.init]]}
    if source.init == "hf" or source.init.startswith("tiny:"):
        return {}
    path = run_of(source)[0] / FILE
    if methods.named(run_config(source).method).reads != "judged" or not path.is_file():
        return {}
    return {each.path: each.sha256 for each in read(path).values() if each.kind == "instruction"}


def _python(key: str, init: str) -> Iterator[tuple[str, Found]]:
    """The source of a function's module, as an import would find it. Nothing is imported here, packages around it included."""
    parts = init.removeprefix(python.PREFIX).split(".")[:-1]
    where: Sequence[str] | None = [str(pathlib.Path.cwd()), *sys.path]
    spec = None
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), where)
        where = spec.submodule_search_locations if spec is not None else None
        if where is None:
            break
    if spec is None or spec.origin is None:  # part of Python itself, or gone
        yield f"{key}.init", Found(key, pathlib.Path(*parts))
    else:
        path = pathlib.Path(spec.origin)
        yield f"{key}.init", Found(key, path, _there(path.parent, [path]))


def _data(cfg: Config, reads: str) -> Iterator[tuple[str, Found]]:
    """The files of each split; of the tiny world, how its texts become tokens, and its pairs. An annotator that learns also reads
    instructions: its own, and those that pairs name."""
    section = cfg.data
    if section.name == "tiny":
        voice = policy_voice()
        both = [voice.tokenizer.path, voice.chat.path]
        yield "data.name", Found("tiny world", both[0].parent, {path.name: path for path in both})
        if reads == "judged":
            for name in templates.TASKS[section.task]:
                path = templates.path_of(name)
                yield f"data.name {name}", Found("instruction", path, _there(path.parent, [path]))
            if section.candidates:
                path = file_of(section.candidates)
                yield "data.candidates", Found("candidates", path, _there(path.parent, [path]))
        if reads == "pairs":
            path = file_of(section.pairs)
            yield "data.pairs", Found("pairs", path, _there(path.parent, [path]))
        return
    root, policy = pathlib.Path(section.path), source_of(POLICY, cfg.policy)
    if reads == "judged":
        yield _instruction("annotator", policy, cfg.annotator.instruction)
    for name in ("train", "validation", "test"):
        split = getattr(section, name)
        if name != "train" and not split:  # held out from train
            continue
        try:
            read = [part.file for part in readers.parts(section.name, root, split)]
            named = readers.instructions(section.name, root, split) if reads == "judged" else []
        except UserError as error:
            raise UserError(f"config.data.path={section.path!r}: {error}") from error
        files = _there(root if root.is_dir() else root.parent, read)
        yield f"data.path {name}", Found("data", root, files, rule=splits.RULE if name == "train" else "")
        for instruction in named:
            yield f"data.path {name}, {instruction}", _instruction("data", policy, instruction)[1]


def _there(inside: pathlib.Path, paths: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Files by their path from a directory, as far as they are there, and all below those that are directories."""
    every = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {pathlib.Path(os.path.relpath(path, inside)).as_posix(): path for path in every if path.is_file()}


# ------------------------------------------------------------------------------------------------ kept, and compared


def nested(inputs: Mapping[str, Input]) -> dict:
    """The inputs as inputs.json holds them."""
    return {key: dataclasses.asdict(each) for key, each in inputs.items()}


def read(path: pathlib.Path) -> dict[str, Input]:
    """What a run wrote; UserError for anything else."""
    values = read_json(path)
    try:
        return {
            key: Input(
                **{name: _kept_text(entry[name]) for name in entry if name != "files"},
                files={n: File(_kept_text(f["sha256"]), tuple(f["stamp"])) for n, f in entry["files"].items()},
            )
            for key, entry in values.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        wanted = "wanted what a run writes; without the file, what there is now counts as what the run began with"
        raise UserError(f"{path} isn't a run's list of its inputs, {wanted}") from error


def _kept_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def compare(before: Mapping[str, Input], now: Mapping[str, Input], cfg: Config) -> list[str]:
    """What isn't the same: `config.annotator.instruction='mine.txt': line 1 was 'inverted: false', is 'inverted: true'`, ..."""
    flat = config.flatten(cfg)
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        name, _, split = key.partition(" ")
        said = f"config.{name}={flat.get(name)!r}{f' ({split})' if split else ''}"
        if key not in now:
            found.append(f"{said} doesn't name {before[key].path} any more")
        elif key not in before and key not in UNLISTED:
            found.append(f"{said} didn't name {now[key].path} then")
        elif key in before and before[key].sha256 != now[key].sha256:
            found.append(f"{said}: {_change(before[key], now[key])}")
    return found


def _change(before: Input, now: Input) -> str:
    if before.kind == "run":
        is_other = before.path != now.path
        return f"{now.path} has changed" if not is_other else f"it was {before.path}, is {now.path}"
    if before.text and now.text:
        return f"{_line(before.text, now.text)} ({now.path})"
    gone = [f"{name} is gone" for name in before.files if name not in now.files]
    new = [f"{name} wasn't there" for name in now.files if name not in before.files]
    both = [name for name in before.files if name in now.files]
    changed = [f"{name} has changed" for name in both if before.files[name].sha256 != now.files[name].sha256]
    every = [*gone, *new, *changed]
    if not every:
        return f"{ANOTHER_CONVERSION if before.kind == 'model' else ANOTHER_RULE} ({before.path})"
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return f"{', '.join(every[:3])}{more} ({before.path})"


def _line(before: str, now: str) -> str:
    """The first line that differs, of a long one what is around the first character that does."""
    old, new = before.split("\n"), now.split("\n")
    at = _first_difference(old, new)
    was, is_now = (lines[at] if at < len(lines) else None for lines in (old, new))
    column = _first_difference(was or "", is_now or "")
    said = ["not there" if line is None else repr(_around(line, column)) for line in (was, is_now)]
    return f"line {at + 1} was {said[0]}, is {said[1]}"


def _around(line: str, column: int) -> str:
    begin = max(column - SHOWN // 2, 0) if len(line) > SHOWN else 0
    return line[begin : begin + SHOWN]


def _first_difference(one: Sequence, other: Sequence) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
