"""The C++ library beside the conformance vectors of the Python runtime."""

import json
import shutil

import pytest

from cpp.conftest import runner


@pytest.mark.parametrize(("bundle", "folder"), [("rich_bundle", "vectors"), ("rich_wan_bundle", "clip_vectors")])
def test_every_vector(release, request, bundle, folder):
    """Of pictures and of clips."""
    done = runner(release / "ddit_vectors")(request.getfixturevalue(bundle), request.getfixturevalue(folder))
    assert done.returncode == 0, done.stderr
    number, _, failed = done.stdout.split(maxsplit=2)
    assert int(number) > 1000
    assert failed == "0 failed\n"


def test_a_vector_that_differs_is_found(release, rich_bundle, vectors, tmp_path):
    folder = shutil.copytree(vectors, tmp_path / "vectors")
    content = json.loads((folder / "vectors.json").read_text())
    content["runs"] = content["runs"][:1]
    content["runs"][0]["steps"][4]["level"] = 8
    (folder / "vectors.json").write_text(json.dumps(content))
    done = runner(release / "ddit_vectors")(rich_bundle, folder)
    assert (done.returncode, done.stderr) == (1, "native: step 4: level differs\n")
