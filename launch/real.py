"""A real language model on a laptop, end to end: SmolLM2-135M-Instruct learns to judge, and is aligned by what it judges.

    python -m launch.real                                   everything, in runs/real
    python -m launch.real --workdir=runs/mine --model=DIR   with any model in Hugging Face's form

It fetches the model, draws two answers to each everyday prompt, labels the pairs by rules (experiments/everyday), trains an
annotator on these labels, and by its preferences a policy for each instruction; the same offline, on the rules' own labels. Each
of these is an ordinary run of experiments/real.py in a directory of its own. What is done isn't done again: the same command
goes on after a kill, and prints the results again once it is through. WORKDIR/results.md has the tables.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import Watch, phase

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    options.define("workdir", "runs/real", options.DIR, "where all of it is made")
    options.define("model", None, options.DIR, "a directory with a model, in place of the one that is downloaded")
    options.define("set", [], options.Kind("KEY=VALUE", "KEY=VALUE", str), "of each run's config", repeatable=True)
    cli.parse()
    cli.import_jax()

import jax

from experiments.everyday import rules
from launch import smollm2
from oaif_jax import config, train
from oaif_jax.base.files import atomic_write_json, atomic_write_text
from oaif_jax.data import readers
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.records import Example, Message
from oaif_jax.evals import drawing
from oaif_jax.models import sharding
from oaif_jax.report import Run, load
from oaif_jax.report.results import evenly
from oaif_jax.report.table import Table, to_markdown, to_rich
from oaif_jax.report.text import NONE, decimal, one_line, percent, percents
from oaif_jax.rollout import named_key
from oaif_jax.run.setup import compute_of, sampler_of, stored_model
from oaif_jax.stored.open import Model, open_model
from oaif_jax.stored.source import POLICY, Source, voice_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
EVERYDAY = ROOT / "experiments" / "everyday"
METHODS = ("online", "offline")
TAUGHT = ("brief", "plain")  # instructions by which policies are trained; the annotator learns all of rules.RULES
SPARE = (
    2  # tokens that a drawn answer is shorter than the limit: its end, and what it has more of when it is read again
)
CHUNK = 32  # prompts that are answered at a time


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done: where, with which model, on which prompts, and what of the configs is set."""

    home: pathlib.Path
    model: pathlib.Path
    prompts: Sequence[str]
    held_out: tuple[int, int] = (48, 96)  # validation, test
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def config(self, member: str) -> ConfigDict:
        """The config of a run."""
        made = cli.load_config(f"{ROOT}/experiments/real.py:{member}")
        own = {"policy.path": str(self.model), "data.path": str(self.data / pathlib.Path(made.data.path).name)}
        own |= {"annotator.init": str(self.run("annotator"))} if made.method == "online" else {}
        cli.override(made, own | dict(self.overrides))
        return made

    def run(self, member: str) -> pathlib.Path:
        """In: "online,brief" -> Out: HOME/online_brief."""
        return self.home / member.replace(",", "_")

    @property
    def data(self) -> pathlib.Path:
        """Where prompts and pairs are."""
        return self.home / "data"


def everything(work: Work, console: Console) -> None:
    """All runs, and their results on the console and in HOME/results.md."""
    settings = config.parse(work.config("online,brief"))
    sharding.use_cpu_devices(settings.mesh.cpu_devices)
    with Watch(console):
        write_data(work, settings)
    for member in ("annotator", *policies()):
        train.run(work.config(member), work.run(member), console=console)
        jax.clear_caches()  # its programs: none of the next run's is one of them
    with Watch(console):
        likelihoods = text_likelihoods(work)
    shown = [annotator_table(work), policy_table(work, likelihoods), samples_table(work)]
    atomic_write_text(work.home / "results.md", "\n".join(map(to_markdown, shown)))
    for table in shown:
        console.print(to_rich(table))


# ------------------------------------------------------------------------------------------------ prompts and pairs


def everyday_prompts() -> list[str]:
    """The prompts of experiments/everyday."""
    lines = (EVERYDAY / "prompts.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def write_data(work: Work, settings: config.Config) -> None:
    """HOME/data: prompts, judged (pairs with an instruction, for the annotator) and pairs of each rule (for offline training),
    each with the same prompts in train, validation and test."""
    validation, test = work.held_out
    bounds = {"train": len(work.prompts) - validation - test, "validation": validation, "test": test}
    if bounds["train"] < 1:
        raise UserError(f"{len(work.prompts)} prompts, of which {validation} + {test} are held out: wanted more")
    drawn, start = answers(work, settings), 0
    for split, count in bounds.items():
        part, start = drawn[start : start + count], start + count
        write(work.data / "prompts" / f"{split}.jsonl", [{"prompt": each["prompt"]} for each in part])
        for name in rules.RULES:
            write(work.data / name / f"{split}.jsonl", list(pairs(part, name, every=split != "train")))
        judged = [
            {"instruction": f"experiments/everyday/{name}.txt", **line}
            for name in rules.RULES
            for line in pairs(part, name, every=False)
        ]
        write(work.data / "judged" / f"{split}.jsonl", judged)


def pairs(drawn: Sequence[dict], rule: str, *, every: bool) -> Iterator[dict]:
    """Pairs as a rule labels them; where it has no preference, as they were drawn if `every` is wanted, else left out."""
    for each in drawn:
        one, other = each["answers"]
        is_first = rules.preferred(rule, each["prompt"], one, other)
        if is_first is not None or every:
            chosen, rejected = (other, one) if is_first is False else (one, other)
            yield {"prompt": each["prompt"], "chosen": chosen, "rejected": rejected}


def answers(work: Work, settings: config.Config) -> list[dict]:
    """Two answers of the start policy to each prompt, in HOME/data/answers.jsonl; drawn again if something else is asked for."""
    path, asked = work.data / "answers.jsonl", work.data / "answers.json"
    limit = settings.data.response_tokens - SPARE
    made_of = {"model": str(work.model), "prompts": list(work.prompts), "seed": settings.seed, "tokens": limit}
    made_of |= {"sample": dataclasses.asdict(settings.sample)}
    if path.is_file() and asked.is_file() and json.loads(asked.read_text()) == made_of:
        return [json.loads(line) for line in path.read_text().splitlines()]
    model = start_policy(work, settings)
    sampler = dataclasses.replace(sampler_of(settings, model.voice, settings.sample.temperature), max_tokens=limit)
    data = DataSet({}, model.voice, settings.data.prompt_tokens, limit)
    examples = [Example((Message("user", prompt),)) for prompt in work.prompts]
    found: list[dict] = []
    with phase("drawing answers", len(examples)) as under_way:
        for rows in drawing.chunks(len(examples), CHUNK):
            made = drawing.draw(
                model.params,
                data.prompts([examples[row] for row in rows], rows),
                named_key(jax.random.key(settings.seed), "answers"),
                voice=model.voice,
                sampler=sampler,
                cfg=model.cfg,
                compute=compute_of(settings),
            )
            found += [
                {"prompt": work.prompts[row], "answers": list(two)} for row, two in zip(rows, made.texts, strict=True)
            ]
            under_way.at(min(len(found), len(examples)))
    found = found[: len(examples)]
    write(path, found)
    atomic_write_json(asked, made_of)
    return found


def start_policy(work: Work, settings: config.Config) -> Model:
    """What all runs begin with, on the mesh."""
    source = Source(POLICY, "hf", str(work.model))
    mesh = sharding.make_mesh(-1, 1, 1)
    return open_model(source, voice_of(source, settings.policy.chat), mesh, settings.compute.frozen)


def write(path: pathlib.Path, lines: Sequence[dict]) -> None:
    """JSON lines; a file that says the same is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not path.is_file() or path.read_text() != text:
        atomic_write_text(path, text)


# ------------------------------------------------------------------------------------------------ results


def text_likelihoods(work: Work) -> dict[str, float]:
    """Log-likelihood of ordinary texts (experiments/everyday/texts.jsonl) in nats a token, by the start policy ("start") and by
    what each run of a policy ended with: what of the general ability stays. HOME/texts.json has what was measured before."""
    path = work.home / "texts.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    found = {}
    settings = config.parse(work.config("online,brief"))
    told = {"start": str(work.model)} | {name: load(work.run(name)).summary["params_sha256"] for name in policies()}
    for name, made in told.items():
        if made not in known:
            model = start_policy(work, settings) if name == "start" else stored_model(work.run(name), "last")[2]
            known[made] = text_likelihood(model, settings)
            atomic_write_json(path, known)
        found[name] = known[made]
    return found


@phase("reading ordinary texts")
def text_likelihood(model: Model, settings: config.Config) -> float:
    """Nats a token of the ordinary texts, as answers to their prompts."""
    examples = readers.read("references", EVERYDAY / "texts.jsonl").examples
    longest = max(len(model.voice.answer(each.reference, stop=True)) for each in examples)
    data = DataSet({}, model.voice, settings.data.prompt_tokens, longest)
    given = data.rollout(data.prompts(examples), [[each.reference] for each in examples], examples)
    params = model.whole(model.params)
    total, tokens = drawing.log_likelihood(params, given, cfg=model.cfg, compute=compute_of(settings))
    return float(total) / float(tokens)


def policies() -> list[str]:
    """The runs of policies, as members of the experiment."""
    return [f"{method},{name}" for name in TAUGHT for method in METHODS]


def annotator_table(work: Work) -> Table:
    """How far the annotator agrees with the rules on held-out pairs, before its training and after it."""
    summary, rows = load(work.run("annotator")).summary, []
    found = summary["annotator"]
    for name in rules.RULES:
        for when, at in (
            ("before", found.get("start", {})),
            ("after", found.get("end", {})),
            ("after, test prompts", found),
        ):
            if name in at:
                cells = [
                    at[name].get(key) for key in ("label_agreement", "order_agreement", "first_position", "answer_mass")
                ]
                shown = [NONE if cell is None else percent(cell) for cell in cells]
                rows.append((f"{name}, {when}", str(at[name].get("decided", 0)), *shown))
    columns = (
        "Instruction",
        "Pairs",
        "Agrees with the rule",
        "Its two orders agree",
        "Position 1",
        "Mass on its answers",
    )
    return Table("The annotator on held-out pairs", columns, tuple(rows))


def policy_table(work: Work, likelihoods: Mapping[str, float]) -> Table:
    """Each policy against the start policy by its rule, and what else has changed."""
    rows, start = [], None
    for member in policies():
        method, name = member.split(",")
        run = load(work.run(member))
        found = run.summary
        start = start or (found["reference_length"], found["reference_finished"])
        judge = found["judge"]
        rows.append(
            (
                f"{name}, {method}",
                *(percent(judge[key]) for key in ("win", "tie", "loss", "score")),
                percents(*judge["interval"]),
                decimal(found["mean_length"]),
                percent(found["finished"]),
                decimal(found["log_ratio"]),
                decimal(likelihoods[member]),
            )
        )
    assert start is not None
    began = (*(NONE,) * 5, decimal(start[0]), percent(start[1]), NONE, decimal(likelihoods["start"]))
    rows.insert(0, ("start policy", *began))
    columns = (
        *("Policy", "Win", "Tie", "Loss", "Win + tie/2", "95 % interval", "Tokens", "Ends"),
        *("Log-ratio", "Ordinary text, nats a token"),
    )
    title = f"Against the start policy by the rule, {run.summary['prompts']} test prompts"
    return Table(title, columns, tuple(rows))


def samples_table(work: Work, count: int = 3) -> Table:
    """Test prompts, evenly spaced, with the answers of the start policy and of each online policy."""
    runs: dict[str, Run] = {name: load(work.run(f"online,{name}")) for name in TAUGHT}
    first = next(iter(runs.values())).last_samples
    rows = []
    for at in evenly(count, len(first)):
        sample = first[at]
        answered = {each.prompt: each.policy for each in (run.last_samples[at] for run in runs.values())}
        assert set(answered) == {sample.prompt}
        texts = [sample.reference or "", *(run.last_samples[at].policy for run in runs.values())]
        rows.append((one_line(sample.prompt), *map(one_line, texts)))
    return Table("Side by side", ("Prompt", "Start policy", *runs), tuple(rows), "Evenly spaced, not the best ones.")


def overridden(given: Sequence[str]) -> dict[str, str]:
    """In: ["steps=2"] -> Out: {"steps": "2"}."""
    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not (key and equals):
            raise UserError(f"--set={each}, wanted KEY=VALUE")
        found[key] = value
    return found


def main() -> None:
    """All that the command line asks for."""
    given, console = flags.FLAGS, Console()
    home = pathlib.Path(given.workdir)
    overrides = overridden(given.set)
    if given.model is None:
        with Watch(console):
            model = smollm2.directory(home)
    else:
        model = pathlib.Path(given.model)
    everything(Work(home, model, everyday_prompts(), overrides=overrides), console)


if __name__ == "__main__":
    cli.call(main)
