"""The poisoned memory of conftest.py does its work: buffers are NaN, and a read of one shows."""

import pytest
import torch
from oracle import BACKENDS, Case, ours

from dimkern.estimators import REGISTRY


def test_fresh_tensors_are_nan():
    x = torch.zeros(3, 4, dtype=torch.float64)
    of_half = x.half().new_empty(3)
    for fresh in (torch.empty(5), x.new_empty(2), torch.empty_like(x), torch.empty_strided((2, 2), (1, 2)), of_half):
        assert bool(fresh.isnan().all())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU library was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_tensors_of_the_native_library_are_nan(dtype):
    """Own-image scores of images whose locations are not given are never written."""
    g, c = torch.zeros(4, 1, 3, dtype=dtype), torch.zeros(2, 5, 3, dtype=dtype)
    _, positives, _ = torch.ops.dimkern_cpu.mean_loss.default(g, c, "jsd", 1.0, 0.0, 0.0, None, None)
    assert positives[:2].isfinite().all()
    assert positives[2:].isnan().all()


@pytest.mark.parametrize("estimator", REGISTRY)
def test_a_removed_beta_is_caught(estimator, monkeypatch):
    """With beta=0 taken away the first block would add to what the gradient's buffer held: the gradient is NaN."""
    assert ours(estimator, Case()).grads["l"].isfinite().all()
    addmm_, calls = torch.Tensor.addmm_, []

    def without_beta(self, a, b, *, beta=1, alpha=1):
        calls.append(beta)
        return addmm_(self, a, b, alpha=alpha)

    monkeypatch.setattr(torch.Tensor, "addmm_", without_beta)
    assert ours(estimator, Case()).grads["l"].isnan().any()
    assert 0 in calls
