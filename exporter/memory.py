"""Whether a model can be run here."""

import os

ROOM = 1.25  # memory that a model needs when it runs, as a multiple of its weights' size


def fits(size: int) -> bool:
    """Whether this machine's memory holds so many bytes of weights, with some left for the work."""
    return ROOM * size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
