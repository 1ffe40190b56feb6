"""The poisoned memory of conftest.py does its work: buffers are NaN, and a read of one shows."""

import pytest
import torch
from oracle import Case, ours

from dimkern.estimators import REGISTRY


def test_fresh_tensors_are_nan():
    x = torch.zeros(3, 4, dtype=torch.float64)
    of_half = x.half().new_empty(3)
    for fresh in (torch.empty(5), x.new_empty(2), torch.empty_like(x), torch.empty_strided((2, 2), (1, 2)), of_half):
        assert bool(fresh.isnan().all())


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
