"""The texts around posts and summaries: the policy's cue, and the annotator's question."""

import functools
import pathlib

INSTRUCTION_DIR = pathlib.Path(__file__).parent / "instructions"
INSTRUCTIONS = ("helpful", "short", "very_short")  # of summaries
# By task: the instructions that its annotators learn, its own first. Two tasks have the same prompts, and the same annotators.
TASKS = {"tldr": INSTRUCTIONS, "helpful": ("answer", "harmless"), "harmless": ("harmless", "answer")}
TASK_OF = {**dict.fromkeys(INSTRUCTIONS, "tldr"), "answer": "helpful", "harmless": "harmless"}

TASK, POST, CUE = "TASK:", "POST:", "\nTL;DR:"
FIRST, SECOND, CLOSING = "\n1:", "\n2:", "\nbetter:"
MARKS = (TASK, POST, CUE, FIRST, SECOND, "better:")  # each is one piece
ANSWERS = ("1", "2")


def prompt(post: str) -> str:
    """What the policy continues."""
    return f"{POST} {post}{CUE}"


def annotation(post: str, text: str) -> str:
    """What the annotator reads before the two summaries; `text` is an instruction's."""
    return f"{TASK} {text}\n{POST} {post}"


def path_of(name_or_path: str) -> pathlib.Path:
    """The file of an instruction: one that comes with the tiny world, or any other by its path."""
    return INSTRUCTION_DIR / f"{name_or_path}.txt" if name_or_path in TASK_OF else pathlib.Path(name_or_path)


@functools.cache
def instruction(name: str) -> str:
    """The text of an instruction that comes with the tiny world; read once, so that all of a run is under the same."""
    return path_of(name).read_text().strip()
