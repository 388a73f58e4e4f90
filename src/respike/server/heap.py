"""The process's heap, told to give back what a server does not need any more.

glibc takes large pieces of memory from the system one by one, and returns each when it is freed;
but every such piece raises the size from which it does so, to 32 MiB at last. States of sequences
are smaller than that, come and go in any order, and so leave holes that stay: several hundred MiB
beside tens that are in use. With a fixed size the holes go back to the system.
"""

import ctypes
import platform

LARGE_BYTES = 1 << 17
"""glibc's own choice before it raises it."""
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


def return_freed_memory() -> bool:
    """Fix the size from which memory is returned at once; whether this system's libc knows how."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    sizes = {M_MMAP_THRESHOLD: LARGE_BYTES, M_TRIM_THRESHOLD: LARGE_BYTES}
    return all(libc.mallopt(name, size) == 1 for name, size in sizes.items())
