"""How a process that trains uses its processor and memory: nothing that is computed depends on it."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
KEPT = 2**28  # bytes at the end of the heap that are not given back
NEVER = 2**30  # collections of middle-aged objects until one of all
LARGE = 2**25  # bytes from which a block is a mapping of its own; glibc takes no more


@contextlib.contextmanager
def ready_to_train() -> Iterator[None]:
    """There is one thread, denormal numbers are 0, the memory that a gradient step frees is there for the next one, and Python
    looks for garbage among young objects alone: a look at all that was imported takes as long as 100 steps of a small network.

    Two threads in one process get in each other's way on a busy machine; whoever trains more, does so in more processes.

    Adam's means of gradients that stay 0 fade into denormal numbers, which processors are slow at. And glibc gives large blocks
    back to the system at every step, which has to clear their pages for the next: a third of the time of CQL over continuous
    actions. It keeps them from now on, in the whole process.
    """
    if sys.platform == "linux":
        adjust: Any = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if adjust is not None:
            adjust(TRIM_THRESHOLD, KEPT)
            adjust(MMAP_THRESHOLD, LARGE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        gc.set_threshold(young, middle, old)
