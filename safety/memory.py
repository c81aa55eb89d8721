"""Memory of this process: how much it has, and giving back what it no longer needs."""

import ctypes
import resource
import sys
from pathlib import Path

import torch

GROWTH = 1.2  # of the process, over what a step needs, until its free memory goes back to the system


def resident_memory():
    """Bytes of physical memory that this process holds now; 0 if the system has no /proc (macOS)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def peak_memory(device):
    """Bytes: the most that this process has held, on a GPU the most that its tensors have."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_free_memory():
    """Give the heap's free pages back to the system; does nothing if the C library is not glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


class FreeMemory:
    """Gives free memory back when the process has grown by a fifth over what a step needs.

    The C library keeps what was freed, and tensors of the next batch, of other lengths, do not fit the gaps: the peak
    grew by 40 % in an epoch. But the step after touches every page again, which costs some machines half a step: so
    not after each. What a step needs is what the process holds after a first one, the most of those seen.
    """

    def __init__(self):
        self.needed = 0  # bytes
        self.first = True  # whether the step that ends is the first since memory went back

    def end_step(self):
        held = resident_memory()
        if self.first:
            self.needed = max(self.needed, held)
        self.first = held > GROWTH * self.needed
        if self.first:
            return_free_memory()
