"""How an ingress asks replicas, without a cluster: replicas that die, fail, are full or say nothing."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from conftest import run
from ddit.runtime.cli import main
from ddit.runtime.errors import BackendError, DditError, NotFiniteError, UsageError
from ddit.runtime.serving.models import ExpiredError, UnavailableError
from ddit.runtime.serving.pictures import ACCEPTED, COMPLETED, PARTIAL, PROGRESS, Told
from ddit.runtime.serving.schema import ImageRequest, Limits
from ddit.runtime.serving.tickets import RoomFullError

pytest.importorskip("ray", reason="needs Ray: pip install 'ddit[ray]'")
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ddit.runtime.serving.ray_figures import ClusterFigures, joined
from ddit.runtime.serving.ray_ingress import ATTEMPTS, RayModel

STEPS = 4
DIED = ActorDiedError()


def everything(seed: int | None) -> list[Told]:
    """What a replica tells of one picture."""
    steps = [Told(PROGRESS, 0, {"step": step}) for step in range(1, STEPS + 1)]
    partial = Told(PARTIAL, 0, {"partial_image_index": 0, "b64_json": f"{seed}"})
    return [
        Told(ACCEPTED, 0, {"seed": seed}),
        *steps[:2],
        partial,
        *steps[2:],
        Told(COMPLETED, 0, {"b64_json": f"{seed}"}),
    ]


class Telling:
    """A replica's stream, as Serve gives one."""

    def __init__(self, items: list[Any]):
        self.items, self.cancelled = items, False

    def __aiter__(self) -> "Telling":
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if item == "nothing":
            await asyncio.sleep(60)
        if isinstance(item, BaseException) and not isinstance(item, DditError):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Replicas that do one after the other what ``scripts`` make of a request."""

    def __init__(self, *scripts: Callable[[ImageRequest], list[Any]]):
        self.scripts = list(scripts)
        self.asked: list[ImageRequest] = []
        self.tellings: list[Telling] = []
        self.pictures = self

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def remote(self, asked: ImageRequest) -> Telling:
        self.asked.append(asked)
        self.tellings.append(Telling(self.scripts.pop(0)(asked)))
        return self.tellings[-1]


def well(asked: ImageRequest) -> list[Any]:
    return everything(asked.seed)


def dies_after(count: int, error: Exception = DIED) -> Callable[[ImageRequest], list[Any]]:
    return lambda asked: [*everything(asked.seed)[:count], error]


def ask(handle: Handle, **fields: Any) -> tuple[list[Told], ClusterFigures]:
    figures = ClusterFigures()
    model = RayModel("engines", Limits(seconds=5.0), figures)
    model._handle = handle  # type: ignore[assignment]

    async def all_told() -> list[Told]:
        return [told async for told in model.pictures(ImageRequest(prompt="a", stream=True, progress=True, **fields))]

    return asyncio.run(all_told()), figures


@pytest.mark.parametrize("count", range(7))
@pytest.mark.parametrize("error", [DIED, ActorUnavailableError("gone", None), BackendError("the GPU is gone"),
                                   UnavailableError("broken")])  # fmt: skip
def test_a_lost_replica_s_request_goes_on_elsewhere(count, error):
    """With the same seed, and the client is told everything once."""
    handle = Handle(dies_after(count, error), dies_after(3), well)
    told, figures = ask(handle)
    assert told == everything(handle.asked[0].seed)
    assert len({asked.seed for asked in handle.asked}) == 1
    assert handle.asked[0].seed is not None
    assert figures.retried._value.get() == 2
    assert all(telling.cancelled for telling in handle.tellings)
    assert [*handle.asked] == sorted(handle.asked, key=lambda asked: -(asked.timeout or 0)), "time goes on"


def test_a_seed_that_was_given_stays():
    told, _ = ask(Handle(dies_after(2), well), seed=7)
    assert told == everything(7)


def test_a_request_does_not_cost_every_replica():
    handle = Handle(*[dies_after(1)] * ATTEMPTS)
    with pytest.raises(BackendError, match=f"{ATTEMPTS} replicas have failed"):
        ask(handle)
    assert not handle.scripts


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFiniteError("NaN"), NotFiniteError),
        (UsageError("unknown schedule"), UsageError),
        (ExpiredError("late"), ExpiredError),
        (RoomFullError("full"), RoomFullError),
        (BackPressureError(3, 2), RoomFullError),
        (DeploymentUnavailableError(None), UnavailableError),
    ],
)
def test_what_another_replica_would_not_mend_is_told(error, kind):
    handle = Handle(lambda asked: [error], well)
    with pytest.raises(kind):
        ask(handle)
    assert len(handle.scripts) == 1


def test_a_replica_that_says_nothing_is_given_up():
    handle = Handle(lambda asked: ["nothing"])
    with pytest.raises(ExpiredError):
        ask(handle, timeout=0.05)
    assert handle.tellings[0].cancelled


def test_a_client_that_goes_cancels():
    handle = Handle(well)
    model = RayModel("engines", Limits(), ClusterFigures())
    model._handle = handle  # type: ignore[assignment]

    async def one() -> None:
        pictures = model.pictures(ImageRequest(prompt="a"))
        await anext(pictures)
        await pictures.aclose()

    asyncio.run(one())
    assert handle.tellings[0].cancelled


def test_limits_hold_before_a_replica_is_asked():
    with pytest.raises(UsageError, match="at most 100"):
        ask(Handle(), steps=101)


def test_figures_of_replicas_are_one_text():
    text = '# HELP x_total X\n# TYPE x_total counter\nx_total{level="2"} 3.0\n# HELP y Y\n# TYPE y counter\n'
    found = joined({("tiny", "a"): text, ("tiny", "b"): text}).decode()
    assert found == (
        "# HELP x_total X\n# TYPE x_total counter\n"
        'x_total{level="2",model="tiny",replica="a"} 3.0\nx_total{level="2",model="tiny",replica="b"} 3.0\n'
    )


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_without_ray_the_commands_say_what_to_install(tiny_bundle, tmp_path, monkeypatch, command):
    for name in [one for one in sys.modules if one == "ray" or "serving.ray_" in one or "ray_data" in one]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    rest = ["--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out"] if command == "generate" else []
    result = run(main, command, tiny_bundle, "--ray", *rest)
    assert result.exit_code == 1
    assert result.stderr == "error: ray is not installed; run: pip install 'ddit[ray]'\n"
