"""One thread, and memory that nobody wrote is NaN: a result that reads it cannot pass for a right one."""

import pytest
import torch


def pytest_configure(config):
    # these tests pass without the native library too; that it warns is a test of its own
    config.addinivalue_line("filterwarnings", "ignore:the native CPU library:UserWarning")
    torch.set_num_threads(1)  # pytest-xdist is the parallelism


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Every torch.empty of a core test is filled with NaN (the training tests set their own determinism)."""
    if request.module.__name__.rpartition(".")[2].startswith("test_train"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
