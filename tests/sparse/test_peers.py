"""Oracle 9 with the peers' own loaders, where ``make bench peers=1`` has installed them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sparse.toys import K, model_of, rows

from quire.roles.sparse.formats.files import write
from quire.roles.sparse.selectors import ReLU, TopK

ROOT = Path(__file__).parents[2]
LOADERS = {
    "sae_lens": "from sae_lens import SAE; made = SAE.load_from_disk(folder); out = made(x)",
    "sparsify": "from sparsify import SparseCoder; made = SparseCoder.load_from_disk(folder); out = made(x).sae_out",
    "dictionary_learning": (
        "import sys, types; stub = types.ModuleType('nnsight'); stub.LanguageModel = object;"
        "sys.modules['nnsight'] = stub;"
        "from dictionary_learning.trainers.top_k import AutoEncoderTopK as made;"
        "out = made.from_pretrained(folder + '/ae.pt')(x)"
    ),
}
CASES: list[tuple[str, str, Any]] = [
    ("sae_lens", "saelens", lambda: TopK(K)),
    ("sae_lens", "saelens", ReLU),
    ("sparsify", "sparsify", lambda: TopK(K)),
    ("dictionary_learning", "dictionary_learning", lambda: TopK(K)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "format", "selector"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_the_peers_own_loader_rebuilds_the_same(peer: str, format: str, selector: Any, tmp_path: Path) -> None:
    python = ROOT / ".peers" / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{peer} is not installed under .peers: make bench peers=1")
    model = model_of(selector(), dtype=torch.float32).eval()
    x = rows(dtype=torch.float32)
    with torch.no_grad():
        wanted = model.decoder(model.encoder({"activation": x}))
    folder = write(model, tmp_path / "d", format)
    torch.save(x, tmp_path / "x.pt")
    code = f"import torch; folder, x = {str(folder)!r}, torch.load({str(tmp_path / 'x.pt')!r}); {LOADERS[peer]}; "
    code += f"torch.save(out.detach(), {str(tmp_path / 'out.pt')!r})"
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=False, env={"SPARSIFY_DISABLE_TRITON": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.load(tmp_path / "out.pt"), wanted, atol=1e-6)
