"""The progress display: plain lines in a log, a bar that fits any terminal, and a time left that makes sense."""

import io
import math
import re
import time

import pytest
from rich.console import Console

from oaif_jax.base import phases
from oaif_jax.run.progress import Progress

TRAINING = {"loss": 0.4321, "annotator.order_agreement": 0.9, "tokens_per_second": 12345.0, "kl": 3.0}


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def log() -> Console:
    """A console that is no terminal, as in a pipe."""
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=20, color_system=None)


def shown(progress: Progress, width: int) -> list[str]:
    """The lines that a terminal of this width shows."""
    console = terminal(width)
    return ["".join(segment.text for segment in line).rstrip() for line in console.render_lines(progress, pad=False)]


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock):
    console = log()
    with Progress(30, 0, "online dpo", interval=10, console=console, clock=clock) as progress:
        for step in range(1, 31):
            clock.now += 1
            progress.update(step, TRAINING)
    lines = console.file.getvalue().splitlines()
    assert [re.match(r"online dpo (\d+)/30", line).group(1) for line in lines] == ["1", "11", "21", "30"]
    assert lines[1] == ("online dpo 11/30, loss 0.4321, annotator's orders agree 90 %, tokens/s 12.3k, 0:19 left")
    assert lines[-1].endswith("took 0:30")


def test_a_log_has_no_control_characters(clock):
    console = log()
    with Progress(3, 0, "a very long description of the run " * 4, console=console, clock=clock) as progress:
        progress.message("[red]as it is[/red]")
        progress.update(1, TRAINING)
    text = console.file.getvalue()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert text.startswith("[red]as it is[/red]\n")
    assert len(text.splitlines()) == 2  # a long line isn't broken


def test_the_last_line_is_not_repeated(clock):
    console = log()
    with Progress(1, 0, "sft", console=console, clock=clock) as progress:
        progress.update(1, TRAINING)
    assert len(console.file.getvalue().splitlines()) == 1


def test_the_last_line_holds_the_last_evaluation(clock):
    console = log()
    with Progress(1, 0, "sft", console=console, clock=clock) as progress:
        progress.update(1, TRAINING)
        progress.update(1, {"gold.score": 0.881})
    assert "win rate 88 %" in console.file.getvalue().splitlines()[-1]


def test_an_error_passes_through_and_the_last_step_is_shown(clock):
    console = log()

    def fail() -> None:
        with Progress(9, 0, "sft", console=console, clock=clock) as progress:
            progress.update(1, TRAINING)
            progress.update(2, TRAINING)
            raise FloatingPointError("loss is nan at step 3")

    with pytest.raises(FloatingPointError, match="at step 3"):
        fail()
    assert console.file.getvalue().splitlines()[-1].startswith("sft 2/9")


def test_time_left_is_that_of_this_process_after_a_resume(clock):
    progress = Progress(100, 40, "online dpo", console=log(), clock=clock)
    assert progress.seconds_left() is None
    clock.now += 60  # compilation
    progress.update(41, TRAINING)
    assert progress.seconds_left() is None
    for step in range(42, 51):
        clock.now += 2
        progress.update(step, TRAINING)
    assert progress.seconds_left() == pytest.approx(50 * 2)
    clock.now += 1.5
    assert progress.seconds_left() == pytest.approx(98.5)  # it goes down between steps
    clock.now += 1e6
    assert progress.seconds_left() == 0


def test_an_evaluation_before_the_first_step_is_no_step(clock):
    progress = Progress(11, 0, "online dpo", console=log(), clock=clock)
    progress.update(0, {"gold.score": 0.5})
    clock.now += 60  # compilation
    progress.update(1, TRAINING)
    assert progress.seconds_left() is None
    clock.now += 1
    progress.update(2, TRAINING)
    assert progress.seconds_left() == pytest.approx(9)


def test_an_evaluation_counts_into_the_time_left(clock):
    progress = Progress(21, 0, "online dpo", console=log(), clock=clock)
    progress.update(1, TRAINING)
    for step in range(2, 12):
        clock.now += 1
        progress.update(step, TRAINING)
    clock.now += 10
    progress.update(11, {"gold.score": 0.8})
    clock.now += 1
    progress.update(12, TRAINING)
    assert progress.seconds_left() == pytest.approx(9 * 21 / 11)


def test_numbers_that_a_run_has_none_of_are_not_shown(clock):
    """Fine-tuning has no win rate and no annotator; loss and speed are missing only before the first step."""
    progress = Progress(10, 0, "sft", console=log(), clock=clock)
    progress.update(1, {})
    line = shown(progress, 120)[0]
    for name in ("loss", "tokens/s"):
        assert f"{name} -" in line
    assert "win rate" not in line
    assert "annotator" not in line
    progress.update(2, {"loss": math.nan, "gold.score": math.nan, "annotator.gold_agreement": math.nan})
    assert "loss -" in shown(progress, 120)[0]


def test_agreement_is_with_gold_where_that_is_known_and_a_mean_of_the_last_steps(clock):
    progress = Progress(40, 0, "online dpo", console=log(), clock=clock)
    progress.update(1, TRAINING)
    assert "annotator's orders agree 90 %" in shown(progress, 140)[0]
    for step in range(2, 40):
        progress.update(step, {"annotator.gold_agreement": 0.5 if step < 30 else 0.7 + 0.2 * (step % 2)})
    assert "annotator = gold 80 %" in shown(progress, 140)[0]


def test_the_win_rate_is_the_last_evaluations_by_gold_or_else_by_the_judge(clock):
    progress = Progress(40, 0, "online dpo", console=log(), clock=clock)
    progress.update(10, {"judge.score": 0.6})
    assert "win rate 60 %" in shown(progress, 120)[0]
    progress.update(20, {"judge.score": 0.6, "gold.score": 0.7})
    progress.update(21, TRAINING)
    assert "win rate 70 %" in shown(progress, 140)[0]


@pytest.mark.parametrize("width", [1, 10, 20, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("steps", [0, 160, 10_000_000])
def test_every_width_is_kept(clock, width, steps):
    progress = Progress(steps, 0, "online dpo", console=terminal(width), clock=clock)
    assert shown(progress, width)
    progress.update(1, TRAINING | {"gold.score": 0.5, "loss": -12345.678})
    lines = shown(progress, width)
    assert 1 <= len(lines) <= 2
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_on_common_terminals(clock, width):
    progress = Progress(160, 0, "online dpo", console=terminal(width), clock=clock)
    for step in (121, 122, 123):
        clock.now += 1
        progress.update(step, TRAINING | {"gold.score": 0.881, "annotator.gold_agreement": 0.912})
    text = "  ".join(shown(progress, width))
    for part in ("online dpo", "123/160", "loss 0.4321", "win rate 88 %", "annotator = gold 91 %", "0:37 left"):
        assert part in text
    assert "tokens/s 12.3k" in text
    assert len(shown(progress, width)) == (1 if width == 120 else 2)


def test_a_terminal_keeps_the_bar_and_the_messages():
    console = terminal(80)
    with Progress(2, 0, "sft", console=console) as progress:
        progress.message("checkpoint [saved]")
        progress.update(1, TRAINING)
        progress.update(2, TRAINING)
    text = console.file.getvalue()
    assert "checkpoint [saved]" in text
    assert "2/2" in text
    assert "took 0:0" in text


def test_steps_and_time_are_estimated_before_the_first_step(clock):
    console = log()
    progress = Progress(240, 0, "online dpo", console=console, clock=clock)
    progress.expect(150.0, "by evaluation 0", " of 32 and 7 evaluations")
    assert console.file.getvalue() == "240 steps of 32 and 7 evaluations: about 2.5 minutes by evaluation 0\n"
    assert "about 2:30 left" in " ".join(shown(progress, 120))
    clock.now += 10
    assert "about 2:20 left" in " ".join(shown(progress, 120))
    for step in (1, 2):
        clock.now += 1
        progress.update(step, TRAINING)
    assert "3:58 left" in " ".join(shown(progress, 120))  # as it was measured
    assert "about" not in " ".join(shown(progress, 120))


def test_an_unknown_time_is_not_guessed(clock):
    console = log()
    Progress(1, 0, "sft", console=console, clock=clock).expect(None, "")
    assert console.file.getvalue() == "1 step: how long, the first steps tell\n"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(5, "half a minute"), (45, "a minute"), (90, "1.5 minutes"), (5400, "1.5 hours"), (36000, "10 hours")],
)
def test_estimates_have_two_figures(clock, seconds, shown):
    console = log()
    Progress(9, 0, "sft", console=console, clock=clock).expect(seconds, "by evaluation 0")
    assert f"about {shown} by" in console.file.getvalue()


def test_a_long_step_and_a_long_phase_are_named_in_a_log(monkeypatch):
    monkeypatch.setattr(phases, "OFTEN", 0.2)
    console = log()
    with Progress(9, 2, "online dpo", console=console):
        time.sleep(0.8)
        with phases.phase("evaluating", total=64) as under_way:
            under_way.at(32)
            time.sleep(0.8)
    lines = console.file.getvalue().splitlines()
    assert any(line.startswith("online dpo 2/9: step 3, 0:0") for line in lines)
    assert any(line.startswith("online dpo 2/9: evaluating 32/64, 0:0") for line in lines)


def test_the_bar_names_the_phase(clock):
    progress = Progress(9, 0, "online dpo", console=terminal(140), clock=clock)
    with phases.phase("compiling the step"):
        assert "compiling the step, 0:0" in " ".join(shown(progress, 140))
    progress.update(1, TRAINING)
    with phases.phase("evaluating", total=64):
        assert "evaluating 0/64" in " ".join(shown(progress, 140))
