"""Prompts to token ids, with a bundle's ``tokenizer.json``, and to what its text encoders make of them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from ddit.runtime.backends.base import Backend, FloatArray
from ddit.runtime.bundle.manifest import TokenizerInfo
from ddit.runtime.errors import BundleError, NotFiniteError

log = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer that fills up and truncates to one length. Safe to call from several threads."""

    def __init__(self, path: Path, info: TokenizerInfo):
        self.info = info
        self._path = path
        self._lock = Lock()  # truncation is a setting of the tokenizer, not of the call
        with _tokenizer_errors(path):
            self._tokenizer = FastTokenizer.from_file(str(path))
            self._tokenizer.no_padding()

    def __call__(self, prompt: str, length: int | None = None) -> tuple[NDArray[np.int64], str]:
        """Ids ``(length,)`` int64 of a prompt, and the end of the prompt that did not fit (empty when all did)."""
        length = length or self.info.length
        with self._lock, _tokenizer_errors(self._path):
            self._tokenizer.enable_truncation(length)
            encoding = self._tokenizer.encode(prompt)
        if len(encoding.ids) > length:
            raise BundleError(f"{self._path} adds more tokens to a prompt than the {length} there are")
        kept = max((end for _, end in encoding.offsets), default=0)
        lost = prompt[kept:].strip() if encoding.overflowing else ""
        ids = encoding.ids + [self.info.pad_id] * (length - len(encoding.ids))
        return np.asarray(ids, dtype=np.int64), lost


@contextmanager
def _tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn the library's exceptions, among them the panics of its Rust code, into one `BundleError` line."""
    try:
        yield
    except BaseException as error:
        # a panic is no Exception, so that Ctrl-C would pass here as well
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{path} is not a usable tokenizer: {error}; export it again") from None


class TextConditioner:
    """Prompts to what the levels are told of them, with a bundle's tokenizers and text encoders."""

    def __init__(self, backend: Backend):
        """Read the tokenizers; encoders are opened when they are first needed."""
        self._backend = backend
        bundle = backend.bundle
        with bundle.unchanged():
            for info in bundle.manifest.encoders:
                bundle.verify_small(info.tokenizer.file)
            self._encoders = [
                (info, Tokenizer(bundle.file(info.tokenizer.file), info.tokenizer)) for info in bundle.manifest.encoders
            ]

    def __call__(self, prompts: Sequence[str], length: int) -> dict[str, FloatArray]:
        """The levels' inputs by name, a row a prompt; ``length`` in tokens, for the encoders that leave it free."""
        conditions: dict[str, FloatArray] = {}
        for info, tokenizer in self._encoders:
            rows = [tokenizer(prompt, length if info.free_length else None) for prompt in prompts]
            for _, lost in rows:
                if lost and info.free_length:
                    log.warning("the prompt is longer than %d tokens; left out: “%s”", length, lost)
            ids = np.stack([ids for ids, _ in rows])
            outputs = self._backend.engine(info.graph).run({"input_ids": ids})
            if not all(np.isfinite(value).all() for value in outputs.values()):
                raise NotFiniteError(f"{info.graph} gave NaN or infinity for the prompt; check it with ddit-run verify")
            conditions |= {info.feeds[name]: value for name, value in outputs.items()}
        return conditions
