"""Memory that a process has freed and still holds."""

import ctypes


def give_back() -> None:
    """Gives what is free back to the system, where malloc is glibc's; elsewhere nothing happens.

    glibc keeps what each thread freed for that thread. XLA compiles in threads of its own, and evaluations have other buffers
    than steps, so that a run would hold all of these beside each other at its peak.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))
