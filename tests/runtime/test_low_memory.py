"""Where memory is short, text encoders and levels take turns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddit.runtime import Pipeline
from ddit.runtime.backends.base import Engine
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeBackend
from ddit.runtime.errors import BackendError
from ddit.runtime.serving.engine_room import EngineRoom

RUN: dict[str, Any] = {"steps": 4, "seed": 3}


def test_text_encoders_and_levels_are_never_in_memory_together(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[frozenset[str]] = []
    opened = OnnxRuntimeBackend.engine

    def watched(self: OnnxRuntimeBackend, graph: str) -> Engine:
        engine = opened(self, graph)
        together.append(frozenset(self._engines))
        return engine

    pipeline = Pipeline.open(tiny_bundle, backend="cpu", low_memory=True)
    expected = [Pipeline.open(tiny_bundle, backend="cpu")(prompt, **RUN).latent for prompt in ("a circle", "a star")]
    monkeypatch.setattr(OnnxRuntimeBackend, "engine", watched)
    first, then = pipeline.backend.phases()
    found = [pipeline(prompt, **RUN).latent for prompt in ("a circle", "a star")]
    np.testing.assert_array_equal(found, expected)
    assert any(graphs & first for graphs in together)
    assert any(graphs & then for graphs in together)
    assert not any(graphs & first and graphs & then for graphs in together)


def test_it_is_refused_where_pictures_are_made_side_by_side(tiny_bundle: Path) -> None:
    pipeline = Pipeline.open(tiny_bundle, backend="cpu", low_memory=True)
    with pytest.raises(BackendError, match="take turns"):
        EngineRoom(pipeline)
