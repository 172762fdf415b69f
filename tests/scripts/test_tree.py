"""The tree of scripts/: commands at the top, what they use in packages beside them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_a_command_finds_its_modules_from_the_repository_s_root(command):
    done = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {command.name} ")


def test_modules_are_no_commands():
    modules = [path for path in (ROOT / "scripts").glob("*/*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert not modules
