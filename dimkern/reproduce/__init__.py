"""The paper's comparison: `dimkern reproduce` trains and probes one encoder a row with the harness of dimkern.train.

budgets    the rows, and what may be spent on them
jobs       what is to do; each done once, by whichever process takes it
tables     Markdown, CSV and plots, from the results alone

This module and `budgets` import without the packages of the extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..train import require_extra
from .budgets import BUDGETS

__all__ = ["BUDGETS", "run"]


def run(budget: str, out: Path | None, settings: dict[str, Any], seeds: tuple[int, ...] = ()) -> list[Path]:
    """Do what is left of a budget (see `jobs.reproduce`), with the default of `out`; raises as `dimkern.train.run`."""
    require_extra()
    from . import jobs

    data = settings.get("data", BUDGETS[budget].settings["data"]).rstrip("/").rpartition("/")[2].removeprefix("folder:")
    return jobs.reproduce(budget, out or Path("runs") / f"reproduce-{budget}-{data}", settings, seeds)
