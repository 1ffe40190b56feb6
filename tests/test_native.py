"""The native CPU backend where its own blocks end: panels of columns, row blocks, strips; instruction sets; threads."""

import os
import re
import subprocess
import sys

import pytest
import torch
from oracle import BACKENDS, BF16, F32, F64, Case, assert_within_budget, ours, reductions

from dimkern import explain
from dimkern.estimators import REGISTRY
from dimkern.native import WHY_NOT_LOADED, bf16_inner, instruction_sets

pytestmark = pytest.mark.skipif(WHY_NOT_LOADED is not None, reason=f"{WHY_NOT_LOADED} (continuous integration does)")
LOSSES = [(estimator, reduction) for estimator in REGISTRY for reduction in reductions(estimator)]
ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())
SHAPES = {  # N, P, L, K around 512 rows, 240 or 120 columns, strips of 8, 16 or 32
    "a row and columns beyond": (27, 19, 9, 33),
    "one channel": (241, 1, 1, 1),
    "two panels and a column": (37, 14, 13, 70),
    "own-image rows in two row blocks": (21, 25, 23, 5),
    "two images": (2, 3, 130, 40),
    "an image fills row blocks": (2, 300, 125, 7),
    "one row each, one location": (2, 1, 1, 3),
    "strips exactly": (8, 4, 30, 32),
}


@pytest.fixture
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def _case(shape, **fields):
    return Case(**{**dict(zip("NPLK", SHAPES[shape], strict=True)), "scale": SHAPES[shape][3] ** -0.5, **fields})


def test_the_library_is_among_the_backends():
    assert "cpu" in BACKENDS


@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_edges(shape, estimator):
    """Blocks that end within a panel, a row block or a strip: within the error budget, in one block or in several."""
    for reduction in {"mean", reductions(estimator)[-1]}:
        for variant in (
            {},
            {"clip": 2.0, "l_dtype": F64},
            {"budget": 0.0, "l_dtype": BF16},
            {"l_layout": "transposed", "budget": 0.6},
            {"l_dtype": BF16, "m_dtype": BF16},
            {"l_dtype": BF16, "m_dtype": BF16, "l_layout": "transposed", "clip": 2.0, "budget": 0.3},
        ):
            case = _case(shape, reduction=reduction, **variant)
            assert_within_budget(estimator, case, ours(estimator, case, "cpu"))


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_every_estimator_at_several_panels(estimator, reduction):
    for fields in ({}, {"clip": 1.5}, {"needs": "l"}, {"needs": "m"}):
        case = _case("a row and columns beyond", reduction=reduction, **fields)
        assert_within_budget(estimator, case, ours(estimator, case, "cpu"))


@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
def test_bfloat16_features(estimator):
    """Any layout, channels in pairs or not, a summary of another dtype: scores are float32's, weights are rounded."""
    for fields in (
        {"K": 6, "l_layout": "width_slice", "m_layout": "strided"},  # no strides of (N, L, K) describe it
        {"K": 6, "l_layout": "channel_slice", "scale": -1.7},
        {"K": 5, "l_layout": "image_slice", "needs": "l"},
        {"K": 70, "N": 30, "L": 20, "l_layout": "transposed", "P": 9, "m_layout": "NPK"},
        {"K": 70, "m_dtype": F32, "l_layout": "transposed"},
        {"K": 70, "m_dtype": F64},
        {"K": 8, "scale": 0.0, "needs": "ms"},
    ):
        for reduction in {"mean", reductions(estimator)[-1]}:
            case = Case(**{"L": 6, "P": 2, "l_dtype": BF16, "m_dtype": BF16, "reduction": reduction, **fields})
            assert_within_budget(estimator, case, ours(estimator, case, "cpu"))


@pytest.mark.skipif(not bf16_inner(), reason="this processor, or DIMKERN_CPU_ISA, has no product of bfloat16")
def test_explain_says_what_is_multiplied():
    l, m = torch.randn(3, 5, 32, dtype=BF16).mT, torch.randn(3, 32, dtype=BF16)
    assert "read in place, multiplied in bfloat16" in explain(l, m, backend="cpu")
    assert "panel by panel, in the cache, multiplied in bfloat16" in explain(l.contiguous(), m, backend="cpu")
    assert "panel by panel, in the cache, multiplied in bfloat16" in explain(l[:, :31], m[:, :31], backend="cpu")
    assert "multiplied in bfloat16" not in explain(l, m.float(), backend="cpu")
    assert "panel by panel, in the cache" in explain(l, m.float(), backend="cpu")


@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_threads(estimator, threads):
    """Within the error budget for any number of threads, and the same to the last bit when run again."""
    for reduction in {"mean", reductions(estimator)[-1]}:
        for fields in ({}, {"clip": 2.0, "budget": 0.8}, {"l_dtype": BF16, "m_dtype": BF16}):
            case = _case("two panels and a column", reduction=reduction, **fields)
            first, again = ours(estimator, case, "cpu"), ours(estimator, case, "cpu")
            assert_within_budget(estimator, case, first)
            torch.testing.assert_close((again.loss, again.grads), (first.loss, first.grads), rtol=0, atol=0)


def test_threads_do_share_the_work():
    """The numbers of the threads' shares are summed in another order than one thread's: the test above tests some."""
    case = _case("two panels and a column", l_dtype=F32)
    alone = ours("w1", case, "cpu").grads["m"]
    torch.set_num_threads(3)
    try:
        assert not torch.equal(ours("w1", case, "cpu").grads["m"], alone)
    finally:
        torch.set_num_threads(1)


def _chosen(isa, **variables):
    """The instruction set that runs where `isa` is asked for."""
    code = (
        "from dimkern.native import instruction_sets as sets; print(*(k for k, v in sets().items() if 'chosen' in v))"
    )
    environment = {**os.environ, "DIMKERN_CPU_ISA": isa, **variables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.skipif("DIMKERN_CPU_ISA" in os.environ, reason="runs the tests above once for each instruction set")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_every_instruction_set(isa):
    """What was built and runs here is held to the same tests as the best."""
    fate = instruction_sets()[isa]
    if "chosen" in fate:
        pytest.skip(f"{isa} is what the tests above ran")
    if "runs here" not in fate:
        pytest.skip(f"{isa}: {fate}")
    assert _chosen(isa) == isa
    _passes_the_tests_above(isa)


def test_an_instruction_set_that_cannot_be_had_is_said():
    """A name that is none warns and leaves the choice as it is; an empty one is as good as no name."""
    code = "import warnings; warnings.simplefilter('error'); import dimkern"
    for isa in ("", "avx9"):
        environment = {**os.environ, "DIMKERN_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert ("DIMKERN_CPU_ISA: avx9 is none that runs here" in run.stderr) == bool(isa), run.stderr
    assert _chosen("avx9") == _chosen("")


def _passes_the_tests_above(isa, *options, **variables):
    some = "ragged_edges and infonce or several_panels and mean or test_threads and 2-infonce"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    options += "-p", "no:cacheprovider", "-p", "no:xdist"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *options, __file__, "-k", some],
        env={**environment, "DIMKERN_CPU_ISA": isa, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
    return run.stderr


@pytest.mark.skipif("DIMKERN_CPU_ISA" in os.environ, reason="chooses one by itself")
def test_amx_in_emulation(native_tests):
    """The library with its AMX instructions emulated; a processor without AMX is not made to choose it by asking."""
    sets = instruction_sets()
    if not sets["amx_bf16"].startswith("built; ") or not re.search("chosen|runs here", sets["avx512_bf16"]):
        pytest.skip("AMX was not built, or runs by itself, or its other instructions do not run here")
    assert _chosen("amx_bf16") != "amx_bf16"
    preload = {"LD_PRELOAD": str(native_tests("amx_preload").with_suffix(".so"))}
    assert _chosen("amx_bf16", **preload) == "amx_bf16"
    # faulthandler would take the emulator's signal
    said = _passes_the_tests_above("amx_bf16", "-p", "no:faulthandler", **preload)
    assert max(map(int, re.findall(r"(\d+) products emulated", said))) > 1000  # of several processes
