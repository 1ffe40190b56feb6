"""Write the estimators' scalar terms out as C++ functors and Triton functions.

`dimkern/estimators.py` states each term once, as text that is a legal expression in all three languages.
The output is committed; `python kernels/emit.py --check` (part of `make lint`) fails where it is stale.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dimkern.estimators import CONSTANTS, REGISTRY, Estimator

ROOT = Path(__file__).resolve().parent.parent
TERMS = {"f": "s", "df": "s", "psi": "s, ref", "phi": "s, ref"}  # term: its arguments


def cpp() -> str:
    constants = "\n".join(f"template <class T> inline constexpr T {n} = T({v!r});" for n, v in CONSTANTS.items())
    rows = "".join(map(_cpp_row, REGISTRY.values()))
    cases = "\n".join(
        f"  if (same_text(name, {row.name.upper()}::name)) return visit({row.name.upper()}{{}}), true;"
        for row in REGISTRY.values()
    )
    return f"""// Written by kernels/emit.py from dimkern/estimators.py; do not edit.
#pragma once

#include "dimkern/math.h"

namespace dimkern {{

enum class Family {{ pointwise, row_lse, global_lse }};

namespace constants {{
{constants}
}}  // namespace constants

{rows}// Calls visit(Estimator{{}}) for the estimator of that name; false where there is none.
template <class Visit>
bool with_estimator(const char* name, Visit&& visit) {{
{cases}
  return false;
}}

}}  // namespace dimkern
"""


def _cpp_row(row: Estimator) -> str:
    shared = str(row.shares_map).lower()
    lines = [
        f"// {row.source}",
        f"struct {row.name.upper()} {{",
        f'  static constexpr const char* name = "{row.name}";',
        f"  static constexpr Family family = Family::{row.family};",
        f"  static constexpr bool shares_map = {shared};  // whether psi and phi are one function",
    ]
    for term, arguments in TERMS.items():
        text = getattr(row, f"{term}_text")
        parameters = ", ".join(f"[[maybe_unused]] T {argument}" for argument in arguments.split(", "))
        names = "".join(f" constexpr T {name} = constants::{name}<T>;" for name in CONSTANTS if name in _names(text))
        lines += ["  template <class T>", f"  static DK_FN T {term}({parameters}) {{{names} return {text}; }}"]
    return "\n".join(lines) + "\n};\n\n"


def triton() -> str:
    constants = "\n".join(f"{name} = tl.constexpr({value!r})" for name, value in CONSTANTS.items())
    functions = "".join(
        f"\n\n@triton.jit\ndef {row.name}_{term}({arguments}):\n    return {getattr(row, f'{term}_text')}\n"
        for row in REGISTRY.values()
        for term, arguments in TERMS.items()
    )
    return f'''"""Written by kernels/emit.py from dimkern/estimators.py; do not edit."""

import triton
import triton.language as tl

from .math import exp, sigmoid, softplus

{constants}
{functions}'''


def _names(text: str) -> set[str]:
    return set(compile(text, "<term>", "eval").co_names)


OUTPUTS = {
    ROOT / "kernels/include/dimkern/estimators.h": cpp,
    ROOT / "dimkern/backends/triton/estimators.py": triton,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if an output is stale")
    check = parser.parse_args().check
    stale = [path for path, text in OUTPUTS.items() if not path.exists() or path.read_text() != text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is stale: run python kernels/emit.py' if check else 'written'}")
        if not check:
            path.write_text(OUTPUTS[path]())
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
