"""Files are written whole or not at all, and what is not a file stays what it is."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from conftest import run
from ddit.runtime.cli import main
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import check_outputs, whole


def write(path, text: str = "new") -> None:
    with whole(path) as part:
        part.write_text(text)


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    for text in ("first", "second"):  # at first the link dangles
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_text() == text
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
def test_a_device_stays_a_device(tmp_path):
    """Root may replace /dev/null by a file, and then nothing on the machine works."""
    device = tmp_path / "null"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    check_outputs([device, device])
    try:
        write(device)
    except DditError:
        pytest.skip("devices cannot be opened on this filesystem")
    finally:
        assert stat.S_ISCHR(device.stat().st_mode)
    assert os.listdir(tmp_path) == ["null"]


def test_a_pipe_gets_the_content(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write(tmp_path / "pipe")
    reader.join(10)
    assert got == ["new"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_standard_output_that_leads_to_a_file_keeps_what_is_there(tmp_path):
    code = "from pathlib import Path; from ddit.runtime.files import whole\nprint('first', flush=True)\n"
    code += "with whole(Path('/dev/stdout')) as part: part.write_text('second\\n')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond\n"


def test_two_writers_at_once_both_end_well(tmp_path):
    with whole(tmp_path / "file.txt") as first, whole(tmp_path / "file.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file.txt").read_text() == "first"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("moment", ["writing", "fsync", "replace"])
def test_what_goes_wrong_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise error

    def write_half() -> None:
        with whole(path) as part:
            part.write_text("half")
            if moment == "writing":
                fail()

    if moment != "writing":
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else DditError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_who_could_read_a_file_still_can(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(0o664)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


def test_a_name_as_long_as_the_disk_allows_is_written(tmp_path):
    write(tmp_path / ("é" * 125 + ".txt"))
    (path,) = tmp_path.iterdir()
    assert path.read_text() == "new"


def test_two_outputs_of_one_name_are_refused(tmp_path):
    (tmp_path / "link.png").symlink_to("out.png")
    for other in (tmp_path / "out.png", tmp_path / "." / "out.png", tmp_path / "link.png"):
        with pytest.raises(UsageError, match="are one file"):
            check_outputs([tmp_path / "out.png", other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "a.png", "--plot", "./a.png"), "a.png and a.png are one file; give every output a name of its own"),
        (("--out", "a" * 300 + ".png"), "cannot be written: File name too long"),
        (("--trace", "a" * 300), "cannot be written: File name too long"),
        (("--trace", "."), "is a folder; name a file"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_the_work(tiny_bundle, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = run(main, "generate", tiny_bundle, "a red circle", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
