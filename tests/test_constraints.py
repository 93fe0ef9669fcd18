"""The files of pinned packages fit one another."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pins(name: str) -> dict[str, str]:
    """Package -> version, each pinned once."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


def test_the_newer_jax_comes_with_the_same_packages():
    """A pin that is moved in one file is moved in both, but for the three that are the difference."""
    ours, newer = pins("constraints.txt"), pins("constraints-jax-0.11.txt")
    assert list(newer) == list(ours)
    assert {name for name in ours if ours[name] != newer[name]} == {"flax", "jax", "jaxlib"}
    for found, version in ((ours, "0.10."), (newer, "0.11.")):
        assert found["jax"] == found["jaxlib"]
        assert found["jax"].startswith(version)


def test_accelerators_fit_the_pinned_jax():
    accelerators, jax = pins("constraints-accelerators.txt"), pins("constraints.txt")["jax"]
    assert {accelerators["jax-cuda13-pjrt"], accelerators["jax-cuda13-plugin"]} == {jax}
    assert not accelerators.keys() & pins("constraints.txt").keys()
    said = re.search(r"that fit jax (\S+):", (ROOT / "constraints-accelerators.txt").read_text())
    assert said is not None
    assert said[1] == jax
