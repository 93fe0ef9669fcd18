"""What the environment tells JAX and XLA, tried before they start: XLA ends a process whose XLA_FLAGS it can't use."""

import functools
import importlib
import os
import re
import subprocess
import sys

from oaif_jax.base import programs
from oaif_jax.base.errors import UserError

# Flags that are no reason to try them.
KNOWN = r"(\s|--xla_force_host_platform_device_count=\d+)*"
# Reads the flags as a compilation does, and leaves no core behind.
PROBE = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from jaxlib import xla_client
xla_client.CompileOptions()
"""


def import_jax() -> None:
    """Imports JAX, for a program that is about to do so. UserError for XLA_FLAGS and JAX_NAME that can't be used."""
    check_flags(os.environ.get("XLA_FLAGS", ""))
    programs.keep()
    try:
        importlib.import_module("jax")
    except ValueError as error:  # by which it answers values of its variables
        named = [name for name in os.environ if name.startswith("JAX_") and name.lower() in str(error).lower()]
        if not named:
            raise
        name = max(named, key=len)
        raise UserError(
            f"{name}={os.environ[name]}: JAX can't use it ({error}), wanted a value that it knows"
        ) from error


@functools.cache
def check_flags(flags: str) -> None:
    """UserError for XLA_FLAGS with which XLA ends a process: tried in another one (0.3 s), if there are any but known ones."""
    if re.fullmatch(KNOWN, flags):
        return
    command = [sys.executable, "-I", "-c", PROBE]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, errors="replace", check=False
    )
    said = re.findall(
        r"^[EF]\d{4} .*?\] (.*)$", done.stderr, re.MULTILINE
    )  # XLA's log; an error of Python has no such line
    if done.returncode and said:
        reason = said[0][:300].rstrip(".")
        raise UserError(f"XLA_FLAGS={flags}: XLA can't use them ({reason}), wanted flags that this jaxlib knows")
