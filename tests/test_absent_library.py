"""The package without its native library, as where no compiler was at hand: it works, and says once what it lacks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import dimkern

SCRIPT = """
import json, warnings, torch, dimkern
torch.manual_seed(0)
l, m = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [dimkern.infonce_loss(l, m)]
    losses[0].backward()
    with torch.no_grad():
        losses.append(dimkern.infonce_loss(l, m))
try:
    dimkern.infonce_loss(l, m, backend="cpu")
except ValueError as error:
    refused = str(error)
said = [(str(w.message), w.filename) for w in caught if "native" in str(w.message)]
print(json.dumps([[x.item() for x in losses], l.grad.sum().item(), said, refused, dimkern.doctor()]))
"""


def test_one_warning_and_the_same_numbers(tmp_path):
    package = Path(dimkern.__file__).parent
    shutil.copytree(package, tmp_path / "dimkern", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    losses, gradient, said, refused, doctor = json.loads(run.stdout.splitlines()[-1])

    torch.manual_seed(0)
    l, m = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3)
    expected = dimkern.infonce_loss(l, m, backend="streaming")
    expected.backward()
    torch.testing.assert_close(losses, [expected.item()] * 2)
    torch.testing.assert_close(gradient, l.grad.sum().item())
    ((text, where),) = said
    assert "the native CPU library was not built" in text
    assert "the streaming backend serves" in text
    assert Path(where) == script  # the caller's line, not one of dimkern's
    assert "the native CPU library was not built" in refused
    assert "not loaded: the native CPU library was not built" in doctor
