"""Prompts to token ids, with a bundle's ``tokenizer.json``."""

from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from ddit.runtime.bundle.manifest import TokenizerInfo
from ddit.runtime.errors import BundleError


class Tokenizer:
    """A tokenizer that fills up and truncates to one length. Safe to call from several threads."""

    def __init__(self, path: Path, info: TokenizerInfo):
        self.info = info
        self._lock = Lock()  # truncation is a setting of the tokenizer, not of the call
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{path} is not a readable tokenizer: {error}") from None
        self._tokenizer.no_padding()

    def __call__(self, prompt: str, length: int | None = None) -> tuple[NDArray[np.int64], str]:
        """Ids ``(length,)`` int64 of a prompt, and the end of the prompt that did not fit (empty when all did)."""
        length = length or self.info.length
        with self._lock:
            self._tokenizer.enable_truncation(length)
            encoding = self._tokenizer.encode(prompt)
        lost = prompt[max(end for _, end in encoding.offsets) :].strip() if encoding.overflowing else ""
        ids = encoding.ids + [self.info.pad_id] * (length - len(encoding.ids))
        return np.asarray(ids, dtype=np.int64), lost
