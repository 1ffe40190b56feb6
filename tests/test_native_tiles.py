"""The tiles of every instruction set against naive sums in double, without torch; `make sanitize` runs them too.

Where the processor has no AMX its instructions are emulated one by one (tests/native/amx_emulator.cpp).
"""

import re
import shutil
import subprocess
from collections import Counter

import pytest


def _passes(executable):
    run = subprocess.run([executable], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b0 failures$", run.stdout.strip())


@pytest.fixture
def amx_tests(native_tests):
    """As native_tests, where the compiler knows AMX."""
    tiles = native_tests("test_tiles")
    if "DIMKERN_HAS_AMX_BF16:INTERNAL=1" not in (tiles.parent / "CMakeCache.txt").read_text():
        pytest.skip("the compiler does not know AMX")
    return native_tests


def test_tiles(native_tests):
    """tests/native/test_tiles.cpp: statistics, kept weights and gradients of ragged blocks, in threads' shares."""
    _passes(native_tests("test_tiles"))


def test_amx_emulator(amx_tests):
    """Values and refusals by hand; of the processor itself where it has AMX."""
    _passes(amx_tests("test_amx_emulator"))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_product_on_amx_is_four_loads_and_four_products(amx_tests):
    """No sum leaves its register within the loop, and nothing but operands is read."""
    dump = ["objdump", "-d", "--no-show-raw-insn", amx_tests("test_tiles")]
    code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    mixes = set()
    for loop in _loops_with("tdpbf16ps", code):
        names = Counter(name for name, _ in loop)
        mixes.add((names["tileloadd"], names["tdpbf16ps"]))
        assert names.total() <= 16
        assert {name for name, operands in loop if "(" in operands} <= {"tileloadd", "lea"}, loop
    assert mixes == {(4, 4), (3, 2), (2, 1)}  # two by two registers of sums, at the edges fewer


def _loops_with(instruction, code):
    """The innermost loops of disassembled code that hold an instruction: (name, operands) of each of theirs."""
    functions = (function for function in code.split("\n\n") if instruction in function)
    lines = re.findall(r"^ +([0-9a-f]+):\t(\S+) *([^\n]*)", "\n".join(functions), flags=re.M)
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    for end, (address, name, operands) in enumerate(lines):
        target = re.match("[0-9a-f]+", operands) if name.startswith("j") else None
        begin = at.get(int(target[0], 16)) if target else None
        if begin is None or int(target[0], 16) >= int(address, 16):
            continue
        inside = [line[1:] for line in lines[begin:end]]
        if any(line[0] == instruction for line in inside) and not any(line[0].startswith("j") for line in inside):
            yield inside
