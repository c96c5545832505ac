"""A small tokenizer to train first: patches to codes of a codebook and back; its codes then are targets."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, mse_loss, normalize

from quire.checkpoint import export
from quire.contracts import Batch, Encoder, Spec, build
from quire.errors import ConfigError
from quire.recipe import instantiate
from quire.roles.latent.contract import LatentCodes, PixelDecoder
from quire.roles.tokens.contract import Layout
from quire.roles.tokens.patches import pair, patch_grid, patchify, unpatchify
from quire.roles.tokens.reconstruct import Target
from quire_cae.examples import DIGITS, tiny_run

PAIR = {
    "encoder": {"class_path": "PatchTokenizer", "init_args": {"patch": 2, "codes": 16, "hidden": 16}},
    "decoder": {"class_path": "PatchTokenDecoder", "init_args": {"hidden": 16}},
    "objective": "Reconstruction",
}


@dataclass
class CodedPatches(LatentCodes):
    """Latents [B,L,c] that are rows of a codebook.

    Attributes:
        ids: [B,L] int64, which rows.
        vocab: V, rows of the codebook.
    """

    ids: Tensor = None  # type: ignore[assignment]
    vocab: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors with a row a sample; the loss has none."""
        return {k: v for k, v in super().tensors().items() if v.ndim}


class PatchTokenizer(Encoder):
    """Images → one of V codes for each patch. Vector quantisation of van den Oord et al. 2017, codes at length 1.

    An MLP sees a patch at a time. Train it with ``PatchTokenDecoder`` and core's ``Reconstruction``, then name its
    checkpoint in ``TokenizerIds``.

    Args:
        patch: Patch size in pixels, one number or [height, width]: that of the encoder whose target it will be.
        codes: V, rows of the codebook.
        width: c, numbers in a code.
        hidden: Width of the MLP.
        commitment: Weight of the pull of the latents towards their codes; the codes' own pull counts 1.

    Returns:
        CodedPatches: latents [B,L,c] with a straight-through gradient, ids [B,L], grid, and ``loss``, the
        bottleneck's two pulls.

    Raises:
        ConfigError: a patch that doesn't divide the image, sizes below 1 or 2 codes.
    """

    fields = ("image",)

    def __init__(
        self,
        patch: int | list[int] = 4,
        codes: int = 256,
        width: int = 8,
        hidden: int = 128,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        if codes < 2 or width < 1 or hidden < 1:
            raise ConfigError(f"PatchTokenizer needs codes >= 2, width and hidden >= 1, got {codes}, {width}, {hidden}")
        self.patch = pair(patch, "PatchTokenizer.patch")
        self.codes, self.width, self.hidden, self.commitment = codes, width, hidden, commitment

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A tokenizer of digits."""
        return {"model": PAIR, "data": DIGITS}

    def build(self, spec: Spec) -> None:
        """Make the MLP and the codebook."""
        super().build(spec)
        self.channels = int(spec.need("channels", self))
        height, width = pair(spec.need("image_size", self), "image_size")
        self.grid = patch_grid(height, width, self.patch)
        values = self.channels * self.patch[0] * self.patch[1]
        self.net = nn.Sequential(nn.Linear(values, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.width))
        self.book = nn.Parameter(normalize(torch.randn(self.codes, self.width), dim=-1))

    def sizes(self) -> dict[str, Any]:
        """``width``, ``grid``, ``vocab``, ``patch``."""
        return {"width": self.width, "grid": list(self.grid), "vocab": self.codes, "patch": list(self.patch)}

    def forward(self, batch: Batch) -> CodedPatches:
        """The codes of one batch."""
        image = batch["image"]
        grid = patch_grid(image.shape[-2], image.shape[-1], self.patch)
        z = normalize(self.net(2 * patchify(image, self.patch) - 1), dim=-1)
        book = normalize(self.book, dim=-1)
        ids = (z.detach() @ book.detach().T).argmax(-1)
        code = embedding(ids, book)
        loss = mse_loss(code, z.detach()) + self.commitment * mse_loss(z, code.detach())
        return CodedPatches(z + (code - z).detach(), grid, loss=loss, ids=ids, vocab=self.codes)


class PatchTokenDecoder(PixelDecoder):
    """Codes [B,L,c] → image [B,C,H,W]: the other half of ``PatchTokenizer``; van den Oord et al. 2017.

    Args:
        hidden: Width of the MLP.

    Needs:
        encoder: PatchTokenizer.

    Raises:
        ConfigError: codes that don't say their patch size.
    """

    encoder: PatchTokenizer

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = hidden

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A tokenizer of digits."""
        return {"model": PAIR, "data": DIGITS}

    def build(self, spec: Spec) -> None:
        """Make the MLP."""
        super().build(spec)
        self.patch = pair(spec.code("patch", self), "patch")
        values = int(spec.need("channels", self)) * self.patch[0] * self.patch[1]
        self.net = nn.Sequential(
            nn.Linear(spec.code("width", self), self.hidden), nn.GELU(), nn.Linear(self.hidden, values)
        )

    def forward(self, codes: CodedPatches) -> Tensor:
        """The image of one batch's codes."""
        rows, columns = codes.grid
        return unpatchify(self.net(codes.latents), (rows, columns), self.patch)


class TokenizerIds(Target):
    """Ids that a frozen discrete encoder gives to the cells: a target as in Chen et al. 2022, with a tokenizer of ours.

    Args:
        tokenizer: An encoder whose codes have ``ids`` [B,N] and a ``grid``, ``PatchTokenizer`` for one; usually
            ``Pretrained`` from its own run. It is frozen here and stays in the checkpoint.

    Returns:
        ids [B,N] int64.

    Raises:
        ConfigError: an encoder without ids, another grid than the patches', a tokenizer that was never trained.
    """

    gives_ids: ClassVar[bool] = True

    def __init__(self, tokenizer: Encoder) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits with a small random tokenizer, exported to a temporary folder."""
        from quire.model import Model

        torch.manual_seed(0)
        parts = {"encoder": PAIR["encoder"], "decoder": PAIR["decoder"]}
        model = Model(**{k: instantiate(v) for k, v in parts.items()}, spec=Spec({"image_size": [8, 8], "channels": 1}))
        model.configure_model()
        loaded = {"class_path": "Pretrained", "init_args": {"path": str(export(model, tempfile.mkdtemp()))}}
        return tiny_run({"class_path": "TokenizerIds", "init_args": {"tokenizer": loaded}})

    def build(self, spec: Spec) -> None:
        """Refuse a tokenizer with random weights; freeze it."""
        if not self.tokenizer.built:
            if "origin" not in self.tokenizer.__dict__:
                raise ConfigError(
                    "TokenizerIds.tokenizer was never trained: give {class_path: Pretrained, init_args: {path: …}}"
                )
            build(self.tokenizer, spec)
        self.tokenizer.frozen = True
        self.tokenizer.requires_grad_(False).eval()

    def size(self, spec: Spec) -> int:
        """V."""
        vocab = self.tokenizer.sizes().get("vocab")
        if vocab is None:
            raise ConfigError(f"TokenizerIds.tokenizer is {type(self.tokenizer).__name__}, whose codes are no ids")
        return int(vocab)

    @torch.no_grad()
    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """[B,N]."""
        with torch.autocast(batch["image"].device.type, enabled=False):
            codes = self.tokenizer({**batch, "image": batch["image"].float()})
        grid, wanted = tuple(codes.grid), layout.only().grid
        if grid != wanted:
            a, b = ("x".join(map(str, g)) for g in (grid, wanted))
            raise ConfigError(f"tokenizer grid {a} differs from patch grid {b}: use the patch size it was trained with")
        return codes.ids
