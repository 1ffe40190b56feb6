"""What the host does around the Triton kernels: autocast, streams and devices, and nothing that waits for the GPU."""

import contextlib

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import torch
from oracle import BF16, F16, F32, Case, loss_of, varied
from simulator import simulated
from simulator.capture import NothingWaits
from triton_losses import PLANS, force, run

import dimkern
from dimkern import ops

RAGGED = Case(N=7, P=3, L=11, K=40, scale=0.3, l_dtype=BF16, m_dtype=BF16)
ORDERS = [
    *(("infonce", "mean", plan) for plan in PLANS),
    *(("dv", "mean", plan) for plan in PLANS if plan != "few launches"),
    *(("jsd", "mean", plan) for plan in PLANS if "rows" not in plan),
    *((estimator, "none", "columns outside, blocked") for estimator in ("infonce", "jsd")),
]


@pytest.fixture
def gpu():
    with simulated(90) as gpu:
        yield gpu


@pytest.mark.parametrize(("estimator", "reduction", "plan"), ORDERS)
def test_nothing_waits(gpu, estimator, reduction, plan, monkeypatch):
    """Forward and backward leave the host ahead of the GPU, so that a CUDA graph can hold them."""
    monkeypatch.setattr(ops, "_is_one", lambda number: False)  # it reads a CPU's numbers only, and these are a GPU's
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    case = varied(RAGGED, l_dtype=F16, m_dtype=F16, reduction=reduction)
    force(monkeypatch, case, **PLANS[plan])
    l, m, scale = case.tensors()
    with NothingWaits() as ran:
        loss = loss_of(estimator, l, m, scale=scale, reduction=reduction, backend="triton")
        torch.autograd.grad(loss, (l, m, scale), torch.full_like(loss, 0.7))
    assert gpu.launches
    assert any("mm" in name for name in ran.names)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, x.sum().item()),
        lambda x: x.index_put_((x > 0,), torch.ones(())),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.to("meta"),
    ],
)
def test_what_waits_is_seen(waits):
    with pytest.raises(RuntimeError, match="makes the host wait"), NothingWaits():
        waits(torch.randn(5))


def test_launches_go_to_the_tensors_device_and_its_current_stream(gpu, monkeypatch):
    """The current device may be another, whose stream is 1; that of theirs changes before the backward."""
    streams = {"another device": 1, "theirs": 5}

    @contextlib.contextmanager
    def device_of(tensor):
        before, gpu.stream = gpu.stream, streams["theirs"]
        yield
        gpu.stream = before

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    gpu.stream = streams["another device"]
    for estimator, reduction, plan in ORDERS:
        case = varied(RAGGED, reduction=reduction)
        force(monkeypatch, case, **PLANS[plan])
        gpu.launches.clear()
        l, m, scale = case.tensors()
        streams["theirs"] = 5
        loss = loss_of(estimator, l, m, scale=scale, reduction=reduction, backend="triton")
        forward = len(gpu.launches)
        streams["theirs"] = 6
        torch.autograd.grad(loss, (l, m, scale), torch.ones_like(loss))
        assert {launch.stream for launch in gpu.launches[:forward]} == {5}
        assert {launch.stream for launch in gpu.launches[forward:]} == {6}


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_rounds_nothing(gpu, plan, monkeypatch):
    """No score and no product of ours is rounded, nor in a backward within it: equal to the last bit."""
    case = varied(RAGGED, l_dtype=F32, m_dtype=F32)
    force(monkeypatch, case, **PLANS[plan])
    outside = run("infonce", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run("infonce", case)
    torch.testing.assert_close((inside.loss, inside.grads), (outside.loss, outside.grads), rtol=0, atol=0)


def test_the_output_of_autocast_is_scored_as_it_is(gpu):
    """Features that a layer made in bfloat16 are the tensor cores' operands; float32 ones stay float32."""
    x, layer = torch.randn(4, 6, 32), torch.nn.Linear(32, 32)
    for autocast, operand in ((True, "bf16"), (False, "fp32")):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = dimkern.infonce_loss(layer(x).mT, layer(x[:, 0]))
        loss.backward()
        assert loss.dtype == layer.weight.grad.dtype == F32
        assert operand in gpu.launches[-2].kernel.src.signature["g"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_autocast_is_off_for_the_tensors_kind_of_device(kind):
    features = type("Features", (), {"device": torch.device(kind)})()
    before = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)
    try:
        with ops._no_autocast(features):
            assert not torch.is_autocast_enabled(kind)
        assert torch.is_autocast_enabled(kind)
    finally:
        torch.set_autocast_enabled(kind, before)
