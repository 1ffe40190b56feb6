"""Gradients as a GPU has them; what the kernels take of the chips, printed as a table after the gates."""

import contextlib
import dataclasses
from unittest import mock

import pytest
from simulator import Resources, table

from dimkern import ops, plan


@pytest.fixture(autouse=True)
def gradients_of_a_gpu():
    """The tensors are on the CPU, which would round gradients of bfloat16 features before the upstream factor."""
    with contextlib.ExitStack() as stack:
        for module in (ops, plan):
            unrounded = lambda device, *dtypes: plan.score_dtype_of(*dtypes)  # noqa: E731
            stack.enter_context(mock.patch.object(module, "locals_gradient_dtype", unrounded))
        yield


@pytest.fixture
def report(record_property):
    """Call it with a kernel's Resources, and they are a line of the table."""
    return lambda resources: record_property("resources", dataclasses.asdict(resources))


def pytest_terminal_summary(terminalreporter):
    reports = [x for found in terminalreporter.stats.values() for x in found if getattr(x, "when", None) == "call"]
    given = [value for report in reports for name, value in report.user_properties if name == "resources"]
    if given:
        rows = sorted((Resources(**value) for value in given), key=lambda r: (str(r.arch), r.label))
        terminalreporter.section("what the kernels take")
        terminalreporter.write_line(table(rows))
