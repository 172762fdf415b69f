"""Prompts that were encoded lately, so that several pictures of one prompt cost one call of the text encoders."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from ddit.runtime.backends.base import FloatArray
from ddit.runtime.bundle.names import NEGATIVE
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.request import Run

KEPT = 256 * 2**20  # bytes; a prompt of 512 tokens of T5-XXL takes 8 MiB

Rows = Mapping[str, FloatArray]  # what the encoders make of one prompt, by the levels' inputs


class EncodedPrompts:
    """`Pipeline.conditions`, with a memory of so many bytes. What was asked for longest ago is forgotten first."""

    def __init__(self, pipeline: Pipeline, kept: int = KEPT):
        self._pipeline, self._kept = pipeline, kept
        self._known: OrderedDict[tuple[str, int], Rows] = OrderedDict()
        self.bytes = 0

    def __call__(self, runs: Sequence[Run]) -> dict[str, FloatArray]:
        """The levels' inputs that text feeds, a row a run, for runs of one text length. Raises `BackendError`."""
        length = runs[0].text_length
        conditions = self._encode([run.prompt for run in runs], length)
        if any(run.guided for run in runs):
            negative = self._encode([run.negative_prompt for run in runs], length)
            conditions |= {NEGATIVE + name: values for name, values in negative.items()}
        return conditions

    def _encode(self, texts: Sequence[str], length: int) -> dict[str, FloatArray]:
        known = {text: self._known[text, length] for text in texts if (text, length) in self._known}
        if missing := [text for text in dict.fromkeys(texts) if text not in known]:
            encoded = self._pipeline.encode(missing, length)
            for row, text in enumerate(missing):
                # a copy, because a view would keep the rows of all others
                known[text] = {name: values[row].copy() for name, values in encoded.items()}
        for text, rows in known.items():
            self._keep((text, length), rows)
        return {name: np.stack([known[text][name] for text in texts]) for name in known[texts[0]]}

    def _keep(self, key: tuple[str, int], rows: Rows) -> None:
        """Remember a prompt as the newest, and forget the oldest ones where all take too much."""
        if key not in self._known:
            self.bytes += _size(rows)
        self._known[key] = rows
        self._known.move_to_end(key)
        while self.bytes > self._kept:
            _, oldest = self._known.popitem(last=False)
            self.bytes -= _size(oldest)


def _size(rows: Rows) -> int:
    return sum(values.nbytes for values in rows.values())
