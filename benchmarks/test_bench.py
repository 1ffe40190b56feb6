"""pytest-benchmark cases: every contender over a few shapes. `pytest benchmarks --benchmark-only`.

For a quick look, and for pytest-benchmark's own histories and comparisons; ratios worth quoting come from
`python -m benchmarks.compare`, whose rounds are interleaved.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")

from . import oracle
from .cases import DTYPES, ESTIMATORS, QUICK, Case
from .contenders import Contender, contenders

_FEW = QUICK[:2]
_SLOW = ("reference", "keops")  # in float32 at the smallest shape only


@pytest.mark.parametrize("contender", contenders(), ids=lambda c: c.name)
@pytest.mark.parametrize("case", _FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("pass_", ["both", "forward"])
def test_bench(benchmark, contender: Contender, case: Case, dtype: str, estimator: str, pass_: str) -> None:
    reason = contender.reason(estimator, case, DTYPES[dtype])
    if contender.name.startswith(_SLOW) and (case, dtype, pass_) != (_FEW[0], "float32", "both"):
        reason = reason or "slow: see compare"
    if contender.compiled and pass_ == "forward":
        reason = reason or "compiles for seconds: see compare"
    if reason:
        pytest.skip(reason)
    l, m = case.inputs(DTYPES[dtype])
    steps = contender.steps(estimator, l, m)
    outputs = steps.both()
    if contender.name != "floor":  # no time for a wrong result
        errors = oracle.errors(oracle.truth(estimator, l, m), *outputs)
        assert errors.within(oracle.budget(DTYPES[dtype], None))
    benchmark.group = f"{estimator} {dtype} {case.name} {pass_}"
    benchmark.pedantic(getattr(steps, pass_), rounds=10, warmup_rounds=1)
