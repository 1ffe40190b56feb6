"""The tiles of every instruction set against naive sums in double, without torch; `make sanitize` runs them too."""

import subprocess


def test_tiles(native_tests):
    """tests/native/test_tiles.cpp: statistics, kept weights and gradients of ragged blocks, in threads' shares."""
    run = subprocess.run([native_tests("test_tiles")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 failures" in run.stdout
