"""What takes long is named, by whichever code does it, and no program is silent for long."""

import io
import threading
import time

import pytest
from rich.console import Console

from oaif_jax.base import phases
from oaif_jax.base.phases import Watch, phase


@pytest.fixture
def quick(monkeypatch):
    """A watch that speaks after tenths of seconds."""
    monkeypatch.setattr(phases, "OFTEN", 0.3)


def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def test_the_watch_speaks_before_ten_seconds_are_over():
    """Also where imports take three of them."""
    assert phases.OFTEN <= 6.5


def test_a_phase_has_its_name_count_and_time():
    with phase("evaluating", total=256) as found:
        found.at(96)
        assert phases.text().startswith("evaluating 96/256, 0:0")
        with phase("asking the judge"):
            assert phases.text().startswith("asking the judge, 0:0")
        assert phases.text().startswith("evaluating 96/256")
    assert phases.text() == ""
    with phase("reading train.jsonl") as found:  # nobody knows how many there are
        assert phases.text().startswith("reading train.jsonl, 0:0")
        found.at(12_000)
        assert phases.text().startswith("reading train.jsonl 12,000, 0:0")


def test_a_phase_ends_with_an_error():
    @phase("exporting")
    def fail() -> None:
        assert phases.text().startswith("exporting")
        raise ValueError("disk")

    for _ in range(2):
        with pytest.raises(ValueError, match="disk"):
            fail()
        assert phases.text() == ""


def test_phases_of_two_threads_are_both_named():
    entered, go_on = threading.Event(), threading.Event()

    @phase("compiling the step")
    def compiling() -> None:
        entered.set()
        go_on.wait(10)

    other = threading.Thread(target=compiling)
    with phase("evaluating", total=8):
        other.start()
        entered.wait(10)
        assert [each.name for each in phases.under_way()] == ["evaluating", "compiling the step"]
        go_on.set()
        other.join()
        assert [each.name for each in phases.under_way()] == ["evaluating"]


def test_a_log_gets_a_line_again_and_again(quick):
    console = log()
    with Watch(console):
        with phase("reading the data"):
            pass
        with phase("loading the policy"):
            time.sleep(1.5)
    lines = console.file.getvalue().splitlines()
    assert 2 <= len(lines) <= 6
    assert all(line.startswith("loading the policy, 0:0") for line in lines)
    assert all(char.isprintable() for line in lines for char in line)


def test_nothing_is_said_of_nothing(quick):
    console = log()
    with Watch(console):
        time.sleep(0.7)
    assert console.file.getvalue() == ""


def test_the_watch_that_was_entered_last_shows(quick):
    outer, inner = log(), log()
    with Watch(outer), phase("training"):
        with Watch(inner, lambda: "step 3"):
            time.sleep(0.7)
        assert "step 3" in inner.file.getvalue()
        assert outer.file.getvalue() == ""
        time.sleep(0.7)
    assert "training" in outer.file.getvalue()


def test_what_ends_at_once_says_nothing():
    """An error of the user's is the only line, whatever was being loaded."""
    console = log()

    @phase("loading the policy")
    def fail() -> None:
        time.sleep(0.6)
        raise ValueError("wanted")

    with Watch(console), pytest.raises(ValueError, match="wanted"):
        fail()
    assert console.file.getvalue() == ""


def test_a_terminal_shows_a_line_that_goes_again():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with Watch(console), phase("loading the annotator"):
        time.sleep(0.6)
    text = console.file.getvalue()
    assert "loading the annotator, 0:0" in text
    assert text.rstrip("\n").endswith(("\x1b[2K", "\x1b[?25h"))  # the line is erased, the cursor is back


def test_a_closed_output_ends_no_program(quick):
    console = log()
    with Watch(console), phase("loading the policy"):
        console.file.close()
        time.sleep(0.7)
