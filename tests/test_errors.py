"""Bad input gets one ValueError or TypeError that names the argument, what came and what is accepted."""

import pytest
import torch

import dimkern
from dimkern import donsker_varadhan_loss, explain, fenchel_dual_loss, infonce_loss
from dimkern.config import parse_bytes

LOSSES = [infonce_loss, fenchel_dual_loss, donsker_varadhan_loss, explain]


def _l(N=4, K=3, *rest, **keywords):
    return torch.zeros(N, K, *(rest or (5,)), **keywords)


def _m(N=4, K=3, *rest, **keywords):
    return torch.zeros(N, K, *rest, **keywords)


INPUTS = {
    "N=1 has no negatives": (lambda: (_l(1), _m(1)), ValueError, ["l is (1, 3, 5)", "N=1", "two images"]),
    "N differs": (lambda: (_l(4), _m(6)), ValueError, ["l and m disagree on N", "(4, 3, 5)", "N=4", "(6, 3)", "N=6"]),
    "K differs": (
        lambda: (torch.zeros(32, 128, 8, 8), torch.zeros(32, 64)),
        ValueError,
        ["l and m disagree on K: l is (32, 128, 8, 8) with K=128, m is (32, 64) with K=64"],
    ),
    "l of rank 2": (lambda: (torch.zeros(4, 3), _m()), ValueError, ["l is (4, 3)", "(N, K, L)", "(N, K, H, W)"]),
    "l of rank 5": (lambda: (_l(4, 3, 2, 2, 2), _m()), ValueError, ["l is (4, 3, 2, 2, 2)", "(N, K, L)"]),
    "m of rank 1": (lambda: (_l(), torch.zeros(4)), ValueError, ["m is (4,)", "(N, K)", "(N, K, P)", "(N, K, 1, 1)"]),
    "m a map": (lambda: (_l(), _m(4, 3, 2, 2)), ValueError, ["m is (4, 3, 2, 2)", "(N, K, 1, 1)"]),
    "no images": (lambda: (_l(0), _m(0)), ValueError, ["l is (0, 3, 5)", "empty"]),
    "no locations": (lambda: (_l(4, 3, 0), _m()), ValueError, ["l is (4, 3, 0)", "empty"]),
    "no summaries": (lambda: (_l(), _m(4, 3, 0)), ValueError, ["m is (4, 3, 0)", "empty"]),
    "no channels": (lambda: (_l(4, 0), _m(4, 0)), ValueError, ["l is (4, 0, 5)", "empty"]),
    "integers": (lambda: (_l(dtype=torch.int64), _m()), TypeError, ["l is torch.int64", "torch.float32"]),
    "booleans": (lambda: (_l(), _m(dtype=torch.bool)), TypeError, ["m is torch.bool", "torch.bfloat16"]),
    "complex": (lambda: (_l(), _m(dtype=torch.complex64)), TypeError, ["m is torch.complex64", "torch.float64"]),
    "float8": (lambda: (_l().to(torch.float8_e4m3fn), _m()), TypeError, ["l is torch.float8_e4m3fn", "torch.float16"]),
    "a list": (lambda: ([[1.0]], _m()), TypeError, ["l is a list", "tensor"]),
    "none": (lambda: (_l(), None), TypeError, ["m is a NoneType", "tensor"]),
    "devices": (lambda: (_l(), _m(device="meta")), ValueError, ["l on cpu", "m on meta"]),
}


def _assert_raises(call, error, *words):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert type(raised.value) is error
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(loss, case):
    make, error, words = INPUTS[case]
    l, m = make()
    _assert_raises(lambda: loss(l, m), error, *words)


EVERY_KEYWORD = {
    "backend": [("fast", ValueError, ["backend is 'fast'", "'auto'", *map(repr, dimkern.BACKENDS)])],
    "clip": [
        (0, ValueError, ["clip is 0", "positive"]),
        (-1.0, ValueError, ["clip is -1.0", "positive"]),
        (float("nan"), ValueError, ["clip is nan", "positive"]),
        (float("inf"), ValueError, ["clip is inf", "finite"]),
        ("20", TypeError, ["clip is a str", "None", "number"]),
        (torch.ones(()), TypeError, ["clip is a Tensor", "number"]),
        (True, TypeError, ["clip is a bool", "number"]),
    ],
    "reduction": [("average", ValueError, ["reduction is 'average'", "'mean'"])],
}
LOSS_KEYWORD = {
    "scale": [
        (torch.ones(1), ValueError, ["scale", "(1,)", "0-d"]),
        (torch.ones(4, 1), ValueError, ["scale", "(4, 1)", "0-d"]),
        (torch.ones((), dtype=torch.int64), TypeError, ["scale", "torch.int64", "floating"]),
        (torch.ones((), dtype=torch.complex64), TypeError, ["scale", "torch.complex64", "floating"]),
        (torch.ones((), device="meta"), ValueError, ["scale is on meta", "cpu"]),
        ("1", TypeError, ["scale is a str", "number", "0-d tensor"]),
        (1j, TypeError, ["scale is a complex", "number"]),
        (False, TypeError, ["scale is a bool", "number"]),
    ],
}
OF_ONE = [
    (infonce_loss, "self_mask", "none", ValueError, ["self_mask is 'none'", "'official'", "'exclude'"]),
    (infonce_loss, "self_mask", None, ValueError, ["self_mask is None", "'official'"]),
    (infonce_loss, "reduction", None, ValueError, ["reduction is None", "'mean'", "'sum'", "'none'"]),
    (fenchel_dual_loss, "measure", "JS", ValueError, ["measure is 'JS'", "'JSD'", "'DV'"]),
    (fenchel_dual_loss, "measure", 3, ValueError, ["measure is 3", "'JSD'"]),
    (fenchel_dual_loss, "reduction", "sum", ValueError, ["reduction is 'sum'", "'mean'", "'none'"]),
    (donsker_varadhan_loss, "reduction", "none", ValueError, ["reduction is 'none'", "'mean'"]),
    (explain, "loss", "nce", ValueError, ["loss is 'nce'", "'infonce'"]),
]
KEYWORDS = [
    *((loss, name, *case) for loss in LOSSES for name, cases in EVERY_KEYWORD.items() for case in cases),
    *((loss, name, *case) for loss in LOSSES[:3] for name, cases in LOSS_KEYWORD.items() for case in cases),
    *OF_ONE,
]


@pytest.mark.parametrize(("loss", "name", "value", "error", "words"), KEYWORDS)
def test_keywords(loss, name, value, error, words):
    _assert_raises(lambda: loss(_l(), _m(), **{name: value}), error, *words)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_that_are_not_there(loss, backend):
    _assert_raises(lambda: loss(_l(), _m(), backend=backend), ValueError, f"backend is {backend!r}", "streaming")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_budget_that_is_too_small_says_what_is_enough(loss):
    """The amount that the message names is accepted when it is given back, word for word."""
    for N in range(2, 60, 3):
        l, m = torch.ones(N, 7, 3, requires_grad=True), torch.ones(N, 7, requires_grad=True)
        with (
            dimkern.config(memory_budget=100),
            pytest.raises(ValueError, match=r"memory_budget is 100 B; .*N=.*K=7") as e,
        ):
            loss(l, m)
        enough = str(e.value).partition("at least ")[2].partition(":")[0]
        with dimkern.config(memory_budget=enough):
            loss(l, m)


def test_a_budget_too_small_for_the_backward_is_refused_by_the_forward():
    """reduction="none" makes its gradients later: what they need is known, and said, at once."""
    l, m = torch.ones(4, 300, 2, requires_grad=True), torch.ones(4, 300, requires_grad=True)
    for budget in range(1000, 12000, 100):
        with dimkern.config(memory_budget=budget):
            try:
                loss = infonce_loss(l, m, reduction="none")
            except ValueError:
                continue
            loss.sum().backward()


@pytest.mark.parametrize("size", ["lots", "", "MB", "-5MB", "1.2.3GB", "5 I", "1e6", "nan", "5XB"])
def test_sizes_that_are_no_sizes(size, monkeypatch):
    _assert_raises(lambda: dimkern.config(memory_budget=size).__enter__(), ValueError, repr(size), "256MB")
    monkeypatch.setenv("DIMKERN_MEMORY_BUDGET", size)
    _assert_raises(lambda: infonce_loss(_l(), _m()), ValueError, "DIMKERN_MEMORY_BUDGET", repr(size), "256MB")


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (0, ValueError, ["memory_budget is 0", "positive"]),
        (-1, ValueError, ["memory_budget is -1", "positive"]),
        ("0MB", ValueError, ["memory_budget is '0MB'", "positive"]),
        (2.5e8, TypeError, ["memory_budget is a float", "int", "256MB"]),
        (None, TypeError, ["memory_budget is a NoneType", "int"]),
        (True, TypeError, ["memory_budget is a bool", "int"]),
    ],
)
def test_budgets_that_are_no_sizes(size, error, words):
    _assert_raises(lambda: dimkern.config(memory_budget=size).__enter__(), error, *words)


def test_sizes_are_read_exactly():
    """Every size of three digits is what it says: 1.13 kB is 1130 bytes, not 1129."""
    for digits in range(100, 1000):
        for unit, size in (("kB", 10**3), ("M", 10**6), ("GB", 10**9), ("TB", 10**12)):
            assert parse_bytes(f"{digits / 100:.2f} {unit}") == digits * size // 100
    assert [parse_bytes(size) for size in ("1KiB", "2 GiB", "3", " 4b ", 5)] == [1024, 2**31, 3, 4, 5]
