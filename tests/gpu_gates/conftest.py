"""Gradients as a GPU has them; what the kernels take of the chips, printed as a table after the gates."""

import dataclasses

import pytest
from oracle import gradients_of_a_gpu
from simulator import Resources, table


@pytest.fixture(autouse=True)
def gradients():
    with gradients_of_a_gpu():
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
