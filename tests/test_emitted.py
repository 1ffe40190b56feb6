"""The emitted C++ and Triton sources say what the rows of `estimators.py` say: compiled, run and compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dimkern.estimators import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
TERMS = ("f", "df", "psi", "phi")


def test_emitted_sources_are_current():
    subprocess.run([sys.executable, ROOT / "kernels/emit.py", "--check"], check=True)


@pytest.fixture(scope="module")
def printed(native_tests) -> dict[tuple[str, str, str], np.ndarray]:
    """{(estimator, term, dtype): rows of (s, ref, value)} as the C++ functors computed them."""
    run = subprocess.run([native_tests("print_terms"), *REGISTRY], check=True, capture_output=True, text=True)
    table: dict[tuple[str, str, str], list[list[float]]] = {}
    for line in run.stdout.splitlines():
        name, term, dtype, *numbers = line.split()
        table.setdefault((name, term, dtype), []).append([float.fromhex(n) for n in numbers])
    return {key: np.array(rows) for key, rows in table.items()}


EXACT = {
    "exp": np.exp,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
}
ULPS = {"exp": 1.5, "sigmoid": 3.0, "softplus": 3.0}  # what math.h promises


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", EXACT)
def test_math_header_keeps_its_promised_error(printed, function, dtype):
    x, _, value = printed["math", function, dtype].T
    with np.errstate(all="ignore"):
        exact = EXACT[function](x.astype(np.longdouble))
        limits = np.finfo(dtype)
        # an underflow to 0, an overflow to inf and a NaN must be just that
        exact = np.where(np.abs(exact) > limits.max, np.inf * np.sign(exact), exact)
        ulp = np.spacing(np.maximum(np.abs(exact), limits.tiny).astype(dtype)).astype(np.longdouble)
        errors = np.where(value == exact, 0, np.abs(value - exact) / ulp)
    normal = np.isfinite(exact) & (np.abs(exact) >= 2 * limits.tiny)
    assert errors[normal].max() <= ULPS[function]
    assert np.all(np.isnan(value) == np.isnan(exact))
    assert np.all(np.isinf(value) == np.isinf(exact))
    below = np.abs(exact) < 2 * limits.tiny
    assert np.all((value[below] >= 0) & (value[below] <= 2 * limits.tiny))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", REGISTRY)
def test_cpp_functors_equal_the_rows(printed, name, term, dtype):
    s, ref, value = torch.from_numpy(printed[name, term, dtype]).T
    expected = getattr(REGISTRY[name], term)(s, ref)
    tolerance = 8 * torch.finfo(getattr(torch, dtype)).eps
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


_INTERPRETED = """
import sys, torch, triton, triton.language as tl
import dimkern.backends.triton.estimators as emitted
from dimkern.estimators import REGISTRY

s = torch.linspace(-17, 17, 256)
ref = (torch.arange(256) % 7) * 0.31
for name, row in REGISTRY.items():
    for term in ("f", "df", "psi", "phi"):
        function = getattr(emitted, f"{name}_{term}")
        arguments = "s, ref" if term in ("psi", "phi") else "s"

        @triton.jit
        def kernel(s_ptr, ref_ptr, out_ptr, TWO: tl.constexpr, FUNCTION: tl.constexpr):
            i = tl.arange(0, 256)
            s = tl.load(s_ptr + i)
            ref = tl.load(ref_ptr + i)
            if TWO:
                value = FUNCTION(s, ref)
            else:
                value = FUNCTION(s)
            tl.store(out_ptr + i, tl.zeros([256], tl.float32) + value)

        out = torch.full_like(s, torch.nan)
        kernel[(1,)](s, ref, out, term in ("psi", "phi"), function)
        expected = getattr(row, term)(s.double(), ref.double())
        # exp is 2 to the power of x log2(e), as on the chip: to round that costs up to |x| 2^-24, where |x| is 19 here
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-6, msg=lambda m: f"{name}.{term}: {m}")
print("equal")
"""


def test_triton_functions_equal_the_rows(tmp_path):
    pytest.importorskip("triton", reason="needs Triton (its interpreter runs without a GPU)")
    script = tmp_path / "interpret.py"  # a file: Triton reads the source of what it interprets
    script.write_text(_INTERPRETED)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]
