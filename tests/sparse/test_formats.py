"""Oracle 9: ours to a file and back is bitwise, files written by hand give their numbers, bad files say so."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.sparse.toys import D, F, K, model_of, rows
from torch import Tensor

import quire
from quire import ConfigError, Model
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.formats.dictionary import SparseDictionary
from quire.roles.sparse.formats.files import read, write
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.selector import Selection, Selector
from quire.roles.sparse.selectors import BatchTopK, Matryoshka, ReLU, TopK

X = rows(20, dtype=torch.float32)


def ours(selector: Selector, **given: Any) -> Model:
    model = model_of(selector, dtype=torch.float32, **given)
    if isinstance(selector, BatchTopK):
        model.encoder({"activation": X})  # it needs a threshold
    return model.eval()


def loaded(path: Path, **given: Any) -> Model:
    given = {"path": str(path), **given}
    model = Model(SparseDictionary(**given), SparseDictionary(**given, part="decoder"), spec={"width": D})
    model.configure_model()
    return model.eval()


def answers(model: Model, x: Tensor = X) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        codes = model.encoder({"activation": x})
        return codes.dense(), model.decoder(codes)


ROUND: list[tuple[str, Any, dict[str, Any]]] = [
    ("saelens", lambda: ReLU(), {}),
    ("saelens", lambda: TopK(K), {}),
    ("saelens", lambda: TopK(K), {"norm": "layer", "subtract_bias": False}),
    ("saelens", lambda: BatchTopK(K), {}),
    ("saelens", lambda: JumpReLU(0.3), {}),
    ("dictionary_learning", lambda: ReLU(), {}),
    ("dictionary_learning", lambda: ReLU(), {"subtract_bias": False}),
    ("dictionary_learning", lambda: TopK(K), {}),
    ("dictionary_learning", lambda: BatchTopK(K), {}),
    ("dictionary_learning", lambda: JumpReLU(0.3), {"subtract_bias": False}),
    ("sparsify", lambda: TopK(K), {}),
    ("attention", lambda: ReLU(), {}),
]


@pytest.mark.parametrize(("format", "selector", "given"), ROUND, ids=lambda v: v if isinstance(v, str) else "")
def test_ours_to_a_file_and_back_is_bitwise(format: str, selector: Any, given: Any, tmp_path: Path) -> None:
    model = ours(selector(), **given)
    again = loaded(write(model, tmp_path, format))
    assert type(again.encoder.selector) is type(model.encoder.selector)
    before, after = model.state_dict(), again.state_dict()
    for name in ("encoder.W_enc", "encoder.b_enc", "decoder.W_dec", "decoder.b_dec"):
        assert torch.equal(before[name], after[name]), name
    for a, b in zip(answers(model), answers(again)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_a_fitted_norm_is_folded_into_the_file(format: str, tmp_path: Path) -> None:
    model = model_of(TopK(K), norm="global_rms", dtype=torch.float32)
    model.encoder({"activation": 5 * X})
    model.eval()
    again = loaded(write(model, tmp_path, format))
    assert again.encoder.norm == "none"
    for a, b in zip(answers(model, 5 * X), answers(again, 5 * X)):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_jumprelu_that_subtracts_is_folded_for_a_format_that_never_does(tmp_path: Path) -> None:
    model = ours(JumpReLU(0.3))
    for a, b in zip(answers(model), answers(loaded(write(model, tmp_path, "dictionary_learning")))):
        assert torch.allclose(a, b, atol=1e-5)


# ---- files written by hand, as the peers' own code writes them
def matrices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc [F,D], W_dec [F,D], b_enc, b_dec."""
    source = torch.Generator().manual_seed(4)
    made = [torch.randn(*s, generator=source) for s in ((F, D), (F, D), (F,), (D,))]
    return made[0], made[1] / made[1].norm(dim=1, keepdim=True), 0.1 * made[2], 0.1 * made[3]


def by_hand(kind: str, folder: Path, **changes: Any) -> Path:
    W_enc, W_dec, b_enc, b_dec = matrices()
    lens = {"W_enc": W_enc.T.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if kind.startswith("saelens"):
        cfg = {"architecture": kind.split()[1], "d_in": D, "d_sae": F, "dtype": "float32"}
        cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
        cfg |= {"metadata": {"model_name": "gpt2", "hook_name": "blocks.7.hook_resid_pre"}}
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": False} if "topk" in kind else {}
        extra = {"threshold": torch.full((F,), 0.7)} if "jumprelu" in kind else {}
        save_file({**lens, **extra, **changes.pop("tensors", {})}, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))
    elif kind.startswith("dictionary_learning"):
        names = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": W_dec.T.contiguous()}
        topk = {"b_dec": b_dec, "k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        torch.save({**names, **({"bias": b_dec} if "standard" in kind else topk)}, folder / "ae.pt")
        trainer = {"dict_class": "AutoEncoder" if "standard" in kind else "AutoEncoderTopK", "activation_dim": D}
        trainer |= {"trainer_class": "x", "dict_size": F, "layer": 3, "lm_name": "gpt2", **changes}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    elif kind == "sparsify":
        tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        save_file({**tensors, **changes.pop("tensors", {})}, folder / "sae.safetensors")
        cfg = {"activation": "topk", "expansion_factor": F // D, "normalize_decoder": True, "num_latents": 0, "k": K}
        cfg |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
        (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))
    else:
        torch.save(lens, folder / "layer_1.pt")
        (folder / "layer_1_cfg.json").write_text(
            json.dumps({"act_size": D, "dict_size": F, "act_name": "z", **changes})
        )
    return folder


def expected(selector: str) -> tuple[Tensor, Tensor]:
    W_enc, W_dec, b_enc, b_dec = matrices()
    z = torch.relu((X - b_dec) @ W_enc.T + b_enc)
    if selector == "topk":
        z = torch.zeros_like(z).scatter(1, z.topk(K, 1).indices, z.topk(K, 1).values)
    z = z * (z > 0.7) if selector == "jumprelu" else z
    return z, z @ W_dec + b_dec


HAND = {
    "saelens standard": "relu",
    "saelens topk": "topk",
    "saelens jumprelu": "jumprelu",
    "dictionary_learning standard": "relu",
    "dictionary_learning topk": "topk",
    "sparsify": "topk",
    "attention": "relu",
}


@pytest.mark.parametrize("kind", HAND)
def test_a_file_written_by_hand_is_recognised_and_gives_its_numbers(kind: str, tmp_path: Path) -> None:
    for a, b in zip(answers(loaded(by_hand(kind, tmp_path))), expected(HAND[kind])):
        assert torch.allclose(a, b, atol=1e-6)


def test_activations_in_units_of_the_decoders_norms_are_folded(tmp_path: Path) -> None:
    free = matrices()[1] * torch.linspace(0.5, 2, F)[:, None]
    folder = by_hand("saelens topk", tmp_path, rescale_acts_by_decoder_norm=True, tensors={"W_dec": free})
    W_enc, _, b_enc, b_dec = matrices()
    norms = free.norm(dim=1)
    z = torch.relu((X - b_dec) @ W_enc.T + b_enc) * norms
    z = torch.zeros_like(z).scatter(1, z.topk(K, 1).indices, z.topk(K, 1).values)
    for a, b in zip(answers(loaded(folder)), (z, (z / norms) @ free + b_dec)):
        assert torch.allclose(a, b, atol=1e-5)


def test_sparsify_stores_its_decoder_row_per_latent_and_a_transposed_one_is_seen(tmp_path: Path) -> None:
    turned = matrices()[1].T.contiguous()
    model = loaded(by_hand("sparsify", tmp_path, tensors={"W_dec": turned}))
    assert torch.equal(model.decoder.W_dec, matrices()[1])


def test_a_transcoder_reads_one_site_and_rebuilds_another(tmp_path: Path) -> None:
    W_enc, W_dec, b_enc, b_dec = matrices()
    model = loaded(by_hand("sparsify", tmp_path, transcode=True))
    z = torch.relu(X @ W_enc.T + b_enc)
    z = torch.zeros_like(z).scatter(1, z.topk(K, 1).indices, z.topk(K, 1).values)
    assert model.encoder.target_width == D
    assert torch.allclose(answers(model)[1], z @ W_dec + b_dec, atol=1e-5)
    ours = model_of(TopK(K), dtype=torch.float32, spec={"target_width": D}).eval()
    (tmp_path / "again").mkdir()
    for a, b in zip(answers(ours), answers(loaded(write(ours, tmp_path / "again", "sparsify")))):
        assert torch.allclose(a, b, atol=1e-5)


def test_where_a_dictionary_is_from_stays_with_it(tmp_path: Path) -> None:
    weights, file = read(by_hand("saelens standard", tmp_path))
    assert weights.metadata["hook_name"] == "blocks.7.hook_resid_pre" and file.name == "sae_weights.safetensors"
    model = ours(TopK(K), spec={"site": "blocks.1.z", "subject": "tiny", "heads": 4, "head_width": 4})
    cfg = json.loads((write(model, tmp_path / "z") / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "hook_z" and cfg["metadata"]["hook_name"] == "blocks.1.z"
    assert cfg["metadata"]["model_name"] == "tiny"


# ---- as a part of a model
def test_a_loaded_half_reloads_when_its_file_is_gone(tmp_path: Path) -> None:
    folder = by_hand("saelens topk", tmp_path)
    model = loaded(folder)
    wanted = answers(model)
    quire.export(model, tmp_path / "export")
    for file in folder.glob("*.*"):
        if file.is_file():
            file.unlink()
    again = quire.load(tmp_path / "export")
    assert isinstance(again.encoder, SparseEncoder) and again.encoder.frozen
    assert again.encoder.origin["metadata"]["model_name"] == "gpt2"
    for a, b in zip(wanted, answers(again)):
        assert torch.equal(a, b)


def test_a_selector_without_equivalent_is_refused_and_a_subclass_noted(tmp_path: Path) -> None:
    class Half(Selector):
        def select(self, z: Tensor, context: Selection) -> SparseCodes:
            return SparseCodes(z * (torch.arange(z.shape[1]) % 2), None, z.shape[1])

    class Special(TopK):
        pass

    with pytest.raises(ConfigError, match="Half has no equivalent in the format saelens"):
        write(ours(Half()), tmp_path)
    cfg = json.loads((write(ours(Special(K)), tmp_path / "s") / "cfg.json").read_text())
    assert cfg["metadata"]["note"] == "trained with Special, written as topk"
    nested = ours(Matryoshka(TopK(K), [20]))
    for a, b in zip(answers(nested), answers(loaded(write(nested, tmp_path / "m")))):
        assert torch.equal(a, b)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_pickled_code_is_refused_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = by_hand("dictionary_learning topk", tmp_path)
    torch.save({"encoder.weight": Code()}, folder / "ae.pt")
    with pytest.raises(ConfigError, match="holds pickled code, which Quire never runs"):
        read(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ConfigError):
        read(folder)
    assert "ran" not in capsys.readouterr().out


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("saelens gated", {}, "architecture 'gated'; Quire reads standard"),
    ("saelens standard", {"normalize_activations": "expected_average_only_in"}, "is not in the weights"),
    ("saelens topk", {"k": None}, "a topk dictionary must say its k"),
    ("saelens standard", {"tensors": {"b_enc": torch.zeros(3)}}, r"b_enc is \[3\]"),
    ("dictionary_learning topk", {"dict_class": "GatedAutoEncoder"}, "dict_class 'GatedAutoEncoder'"),
    ("dictionary_learning topk", {"dict_size": 7}, "dict_size says 7"),
    ("sparsify", {"activation": "groupmax"}, "activation 'groupmax'; Quire reads topk"),
    ("sparsify", {"skip_connection": True}, "has a skip connection"),
    ("sparsify", {"num_latents": 50}, "50 latents of width 16 were said"),
    ("attention", {"act_size": 7}, "says act_size 7, the weights have 16"),
]


@pytest.mark.parametrize(("kind", "changes", "says"), BAD, ids=[s[:30] for *_, s in BAD])
def test_what_cannot_be_read_says_why(kind: str, changes: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read(by_hand(kind, tmp_path, **dict(changes)))


def test_files_that_are_no_dictionary_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="saelens: cfg.json and sae_weights.safetensors; dictionary_learning"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="did you mean saelens"):
        read(tmp_path, "saelen")
    with pytest.raises(ConfigError, match="part must be encoder or decoder"):
        SparseDictionary(str(tmp_path), part="both")
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "sae.safetensors").write_text("")
    with pytest.raises(ConfigError, match="no JSON"):
        read(tmp_path)


WRONG: list[tuple[str, Any, dict[str, Any], str]] = [
    ("sparsify", ReLU, {}, "has no relu"),
    ("sparsify", lambda: TopK(K), {"norm": "layer"}, "has no norm: layer"),
    ("sparsify", lambda: TopK(K), {"subtract_bias": False}, "subtract b_dec; this encoder does not"),
    ("dictionary_learning", lambda: TopK(K), {"subtract_bias": False}, "subtracts b_dec; this encoder does not"),
    ("dictionary_learning", lambda: TopK(K), {"norm": "layer"}, "has no norm: layer"),
    ("attention", lambda: TopK(K), {}, "holds ReLU dictionaries"),
    ("saelens", lambda: TopK(K), {"spec": {"target_width": 5}}, "has no topk transcoder"),
]


@pytest.mark.parametrize(("format", "selector", "given", "says"), WRONG, ids=[w[3][:25] for w in WRONG])
def test_what_a_format_cannot_hold_is_refused(
    format: str, selector: Any, given: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        write(ours(selector(), **dict(given)), tmp_path, format)


def test_an_untrained_threshold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no threshold yet"):
        write(model_of(BatchTopK(K), dtype=torch.float32), tmp_path)
    with pytest.raises(ConfigError, match="needs? a|written from a model with"):
        write(Model(spec={"width": D}), tmp_path)


def test_rows_per_latent_is_what_lies_in_ours(tmp_path: Path) -> None:
    model = ours(TopK(K))
    assert load_file(write(model, tmp_path / "a") / "sae_weights.safetensors")["W_enc"].shape == (D, F)
    assert load_file(write(model, tmp_path / "b", "sparsify") / "sae.safetensors")["W_dec"].shape == (F, D)
    assert isinstance(loaded(tmp_path / "a").decoder, SparseDecoder)
