"""Clips over HTTP, with OpenAI's own client."""

import asyncio
import base64
import io
import time
from collections.abc import Iterator

import av
import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image, ImageSequence

from ddit.runtime import Pipeline
from ddit.runtime.errors import BackendError
from ddit.runtime.serving.clip_schema import ClipRequest, nearest_frames
from ddit.runtime.serving.clips import Clips
from ddit.runtime.serving.schema import Limits
from ddit.runtime.video import save_clip
from served import Served, serving

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
VIDEOS = "/v1/videos"
SIZE = "64x64"
QUICK = {"seed": 3, "steps": 3, "schedule": "native"}
PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def pipeline(wan_bundle) -> Pipeline:
    return Pipeline.open(wan_bundle, backend="cpu")


@pytest.fixture(scope="module")
def server(pipeline) -> Iterator[Served]:
    with serving(pipeline, in_flight=2, waiting=2, limits=Limits(prompt=200, steps=60)) as served:
        yield served


def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: Served, **values) -> httpx.Response:
    return httpx.post(server.url + VIDEOS, json={"prompt": "a red circle", "size": SIZE, "frames": 5, **values})


def ended(server: Served, video: str) -> dict:
    """A clip when it is done with."""
    end = time.monotonic() + PATIENCE
    while (found := httpx.get(f"{server.url}{VIDEOS}/{video}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def frames_of(content: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_openai_s_client_gets_the_pipeline_s_clip(server, pipeline, tmp_path):
    fps = pipeline.bundle.manifest.decoder.frames_per_second
    videos = client(server).videos
    made = videos.create_and_poll(
        prompt="a red circle",
        size=SIZE,
        seconds=str(5 / fps),
        poll_interval_ms=50,
        extra_body={**QUICK, "guidance": 4.0, "negative_prompt": "stars"},
    )
    assert (made.status, made.progress, made.size) == ("completed", 100, SIZE)
    assert float(made.seconds) == pytest.approx(5 / fps)
    assert (made.ddit["frames"], made.ddit["seed"], made.ddit["steps"]) == (5, 3, 3)
    assert made.expires_at > made.completed_at >= made.created_at
    found = frames_of(videos.download_content(made.id).read())
    size = {"height": 64, "width": 64, "frames": 5}
    alone = pipeline("a red circle", guidance=4.0, negative_prompt="stars", **QUICK, **size)
    save_clip(alone.frames, tmp_path / "alone.mp4", fps)
    expected = frames_of((tmp_path / "alone.mp4").read_bytes())
    assert len(found) == len(expected) == 5
    # a rounded pixel may change what the codec leaves out around it
    assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 3
    thumbnail = Image.open(io.BytesIO(videos.download_content(made.id, variant="thumbnail").read()))
    assert thumbnail.size == (64, 64)


def test_clips_are_listed_and_deleted(server):
    ids = [ask(server, **QUICK).json()["id"] for _ in range(3)]
    for one in ids:
        assert ended(server, one)["status"] == "completed"
    videos = client(server).videos
    assert [video.id for video in videos.list(limit=2)][:3] == ids[::-1], "page after page"
    assert videos.delete(ids[1]).deleted
    assert [video.id for video in videos.list(order="asc", after=ids[0])] == [ids[2]]
    for path in (ids[1], f"{ids[1]}/content"):
        assert httpx.get(f"{server.url}{VIDEOS}/{path}").status_code == 404


def test_a_clip_that_is_deleted_is_given_up(server):
    first, second = (ask(server, steps=60, schedule="native", frames=33).json()["id"] for _ in range(2))
    answer = httpx.get(f"{server.url}{VIDEOS}/{first}/content")
    assert answer.status_code == 400
    assert "not done" in answer.json()["error"]["message"]
    for one in (first, second):
        assert httpx.delete(f"{server.url}{VIDEOS}/{one}").json() == {
            "id": one,
            "object": "video.deleted",
            "deleted": True,
        }
    end = time.monotonic() + PATIENCE
    while server.worker.open or not server.worker.room.idle:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_other_formats(server, kind):
    video = ask(server, output_format=kind, **QUICK).json()["id"]
    assert ended(server, video)["status"] == "completed"
    answer = httpx.get(f"{server.url}{VIDEOS}/{video}/content")
    assert answer.headers["content-type"] == f"image/{kind}"
    assert len([*ImageSequence.Iterator(Image.open(io.BytesIO(answer.content)))]) == 5


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"frames": 6}, "5 or 9"),
        ({"seconds": 1}, "leave one out"),
        ({"size": "65x64"}, "multiple"),
        ({"model": "sora-2"}, "sora-2"),
        ({"prompt": "a" * 201}, "201"),
        ({"colour": "red"}, "colour"),
        ({"steps": "many"}, "steps"),
        ({"output_format": "avi"}, "mp4"),
        ({"schedule": "sometimes"}, "sometimes"),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_said_at_once(server, values, text):
    answer = ask(server, **values)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert text in f"{error['message']} {error['param']}"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}'])
def test_bodies_that_are_none(server, body):
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=x", "text/plain"):
        answer = httpx.post(server.url + VIDEOS, content=body, headers={"content-type": kind})
        assert answer.status_code == 400, (kind, answer.text)
        assert answer.json()["error"]["message"]


def test_files_are_refused(server):
    files = {"input_reference": ("a.png", b"\x89PNG", "image/png")}
    answer = httpx.post(server.url + VIDEOS, data={"prompt": "a star"}, files=files)
    assert answer.status_code == 400
    assert "input_reference" in answer.json()["error"]["param"]


def test_more_than_may_wait_is_refused(server):
    long = {"steps": 60, "schedule": "native", "frames": 33}
    answers = [ask(server, **long) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    for answer in answers[:4]:
        httpx.delete(f"{server.url}{VIDEOS}/{answer.json()['id']}")


def test_an_end_without_a_clip_is_said(server, monkeypatch):
    late = ended(server, ask(server, timeout=0.001, **QUICK).json()["id"])
    assert (late["status"], late["error"]["code"]) == ("failed", "server_error")
    assert "timeout" in late["error"]["message"]

    def fail(*arguments):
        raise BackendError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.worker.room.pipeline, "decode", fail)
        failed = ended(server, ask(server, **QUICK).json()["id"])
    assert failed["error"]["message"] == "no more memory"
    answer = httpx.get(f"{server.url}{VIDEOS}/{failed['id']}/content")
    assert (answer.status_code, "no more memory" in answer.text) == (404, True)


def test_a_file_that_cannot_be_written_is_the_end_of_its_clip_alone(server, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ddit.runtime.serving.clips.save_clip", full)
        failed = ended(server, ask(server, **QUICK).json()["id"])
    assert failed["error"] == {"code": "server_error", "message": "something went wrong here"}
    assert ended(server, ask(server, **QUICK).json()["id"])["status"] == "completed"


def test_pictures_are_clips_of_one_frame(server, pipeline):
    body = {"prompt": "a red circle", "size": SIZE, "stream": True, "progress": True, **QUICK}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=60) as response:
        text = "".join(response.iter_text())
    assert "image_generation.completed" in text
    assert '"preview"' in text
    found = client(server).images.generate(prompt="a red circle", size=SIZE, extra_body=QUICK).data[0]
    alone = pipeline("a red circle", height=64, width=64, frames=1, **QUICK)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.b64_json))), int)
    assert np.abs(pixels - np.asarray(alone.image, int)).max() <= 1


def test_what_is_kept_has_a_bound(server, pipeline):
    """In bytes and in seconds; the newest stays."""

    async def make() -> tuple[list[str], list[str]]:
        request = ClipRequest(prompt="a star", size=SIZE, frames=5, output_format="gif", **QUICK)
        clips = Clips(server.worker, Limits(), kept_bytes=1, kept_seconds=0.5)
        made = [await clips.create(request) for _ in range(3)]
        await asyncio.gather(*(clip.task for clip in made))
        newest = max(made, key=lambda clip: clip.completed)
        kept = [clip.id for clip in clips.all()]
        assert kept == [newest.id]
        await asyncio.sleep(0.6)
        return kept, [clip.id for clip in clips.all()]

    kept, later = asyncio.run(make())
    assert (len(kept), len(later)) == (1, 0)


def test_seconds_become_the_nearest_frames(pipeline):
    manifest = pipeline.bundle.manifest
    fps = manifest.decoder.frames_per_second
    for frames in (1, 5, 81):
        assert nearest_frames(manifest, frames / fps) == frames
        assert nearest_frames(manifest, (frames + 1.4) / fps) == frames


def test_a_server_that_ends_gives_clips_up(pipeline):
    begin = time.monotonic()
    with serving(pipeline, limits=Limits(steps=2000)) as served:
        assert ask(served, steps=2000, schedule="native", frames=81).status_code == 200
        ready = time.monotonic()
    assert time.monotonic() - ready < 10 + (ready - begin)


def test_the_model_says_what_clips_it_makes(server):
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["ddit"]["frames"] == 9
    assert model["ddit"]["frames_per_second"] > 0
    assert model["ddit"]["sizes"] == [{"width": [64, 256], "height": [64, 256], "frames": [1, 81]}]
