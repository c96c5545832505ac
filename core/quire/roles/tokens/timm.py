"""Any plain vision transformer of timm, unchanged, under the tokens contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.data import expand
from quire.errors import ConfigError, DataError, suggest
from quire.roles.tokens.blocks import run_tokens
from quire.roles.tokens.contract import Layout, Segment, Subset, TokenEncoder, Tokens, gather, indices, layer_number
from quire.roles.tokens.patches import pair, patch_grid
from quire.roles.tokens.positions import Positions, attached, check_kind
from quire.roles.tokens.timm_weights import TimmWeights, load_file, model_weights

KINDS = ("keep", "none", "resample", "learned", "sincos")


class TimmViT(TokenEncoder):
    """A vision transformer of timm by its name, weights optional; its blocks are used as they are.

    Reads ``image`` [B,C,H,W] in [0,1] and normalises it with the mean and deviation that timm gives for the model.
    Class, distillation and register tokens are prefix tokens. Plain models (ViT, DeiT, CLIP, SigLIP, DINOv2…) can do
    all; models with rotary positions (EVA-02, DINOv3, …) take a subset but no context.

    Args:
        model: Name in ``timm.list_models()``.
        pretrained: True loads timm's weights (needs them in the cache, or a network), a path a file of weights
            (safetensors, or ``torch.save``'s; no code in it is run). A checkpoint of the run needs neither again.
        positions: ``keep`` the model's own; ``none`` takes its table away; ``resample`` fits the table to the data's
            image size and to any other. ``learned`` and ``sincos`` replace it by a table of ours, without a row for
            prefix tokens.
        options: Further arguments of ``timm.create_model``: ``{patch_size: 4, depth: 6}``.

    Returns:
        Tokens: values [B,N,D], prefix [B,P,D].

    Raises:
        ConfigError: an unknown name, a model that isn't a plain ViT (with the reason), another image size than the
            pretrained positions' with ``keep``.
        DataError: weights that can't be loaded or don't fit.
    """

    fields = ("image",)
    capabilities = frozenset(
        {"subset", "context", "features", "grid"}
    )  # of a plain ViT; each model's own when it is made
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: str, pretrained: bool | str = False, positions: str = "keep", options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(model):
            raise ConfigError(f"timm has no model {model!r}{suggest(model, timm.list_models())}")
        self.model, self.pretrained, self.options = model, pretrained, dict(options or {})
        self.table, self.table_std = check_kind(positions, KINDS), 0.02
        self.places: Positions | None = None
        with torch.device("meta"):  # shapes only, to know what it can do before it is built
            plan: Any = timm.create_model(model, num_classes=0, **self.options)
        self.reason, self.context_reason = refusals(plan)
        self.capabilities = _capabilities(self.reason, self.context_reason)
        self.width = getattr(plan, "embed_dim", plan.num_features)
        self.prefix_tokens = getattr(plan, "num_prefix_tokens", None) or 0
        self.rotary = getattr(plan, "rope", None) is not None
        if not self.reason:
            self.patch = pair(plan.patch_embed.patch_size, "patch_size")
        if self.table in ("none", "learned", "sincos") and self.rotary:
            raise ConfigError(f"TimmViT({model}) has rotary positions in every block; use positions: keep")
        if self.table in ("none", "learned", "sincos") and hasattr(plan, "dist_token"):
            raise ConfigError(f"TimmViT({model}) can't lose its positions (it has a distillation token); use keep")
        own = "learned" if self.rotary or getattr(plan, "pos_embed", None) is not None else "none"
        self.positions = own if self.table in ("keep", "resample") else self.table

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A masked autoencoder on digits."""
        options = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
        encoder = {"model": "vit_tiny_patch16_224", "options": options}
        return {
            "model": {
                "encoder": {"class_path": "TimmViT", "init_args": encoder},
                "decoder": {"class_path": "GridDecoder", "init_args": {"width": 16, "depth": 1, "heads": 2}},
                "objective": "MaskedReconstruction",
            },
            "data": "Digits",
        }

    def lacks(self, capability: str) -> str:
        """The model's name and what stands in the way."""
        return f"({self.model}) {self.reason or self.context_reason or super().lacks(capability)}"

    # ---- life
    def build(self, spec: Spec) -> None:
        """Create timm's model for the data's channels and image size."""
        super().build(spec)
        if self.reason:
            raise ConfigError(f"TimmViT({self.model}) {self.reason}; only plain vision transformers are supported")
        self.channels = int(spec.need("channels", self))
        size = pair(spec.need("image_size", self), "image_size")
        patch_grid(*size, self.patch)
        self.vit: Any = self._create(size)
        for unused in (self.vit.fc_norm, self.vit.attn_pool if hasattr(self.vit, "attn_pool") else None):
            if isinstance(unused, nn.Module):
                unused.requires_grad_(False)  # timm pools with these; here they only ride along
        if self.table in ("none", "learned", "sincos"):
            self._drop_positions()
        if self.table in ("learned", "sincos"):
            self.places = Positions(self.table, self.layout(spec), self.width, self.table_std)
        cfg: Any = self.vit.pretrained_cfg
        mean, std = (cfg["mean"], cfg["std"]) if self.channels == len(cfg["mean"]) else ((0.5,), (0.5,))
        self.scale = ([*mean] * (self.channels // len(mean)), [*std] * (self.channels // len(std)))
        self.register_buffer("mean", torch.tensor(self.scale[0]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.scale[1]).view(1, -1, 1, 1), persistent=False)
        self.init_args["pretrained"] = False  # a checkpoint holds the weights

    def _create(self, size: tuple[int, int]) -> nn.Module:
        import timm

        by_name = self.pretrained is True
        if by_name and self.table == "keep" and not self.rotary:
            cfg: Any = timm.get_pretrained_cfg(self.model)
            native = tuple(cfg.input_size[1:])
            if size != native:
                raise ConfigError(
                    f"TimmViT({self.model}) has positions for {native[0]}x{native[1]} images, the data has "
                    f"{size[0]}x{size[1]}: set positions: resample"
                )
        self.given = {"num_classes": 0, "in_chans": self.channels, "img_size": list(size), **self.options}
        if self.table == "resample":
            self.given["dynamic_img_size"] = True
        try:
            vit = timm.create_model(self.model, pretrained=by_name, **{**self.given, "img_size": size})
        except (OSError, RuntimeError) as error:
            if not by_name:
                raise
            raise DataError(f"the weights of {self.model} can't be loaded ({error}); set pretrained: false") from error
        if isinstance(self.pretrained, str):
            load_file(vit, expand(self.pretrained), self.model, self.table != "keep")
        return vit

    def _drop_positions(self) -> None:
        vit, prefix = self.vit, self.prefix_tokens
        if vit.pos_embed is None:
            return
        if prefix and not vit.no_embed_class:  # the prefix tokens' own rows stay, as part of those tokens
            start = 0
            for token in (vit.cls_token, vit.reg_token):
                if token is not None:
                    token.data += vit.pos_embed.data[:, start : start + token.shape[1]]
                    start += token.shape[1]
        vit.pos_embed = None

    def attach_positions(self, kind: str, init: str = "zeros", std: float = 0.02) -> None:
        """Give an encoder made with ``positions: none`` a table; ``init_args`` says so from now on."""
        if not attached(self, kind, init, self.table):
            return
        self.table, self.table_std = kind, std if init == "normal" else 0.0
        if self.built:
            like = next(self.vit.parameters())
            self.places = Positions(kind, self.built_layout, self.width, self.table_std).to(like.device, like.dtype)

    def layers(self) -> list[nn.Module]:
        """Patch embedding with tokens and positions, then the blocks."""
        loose = nn.ParameterList(p for _, p in self.vit.named_parameters(recurse=False))
        first = [self.vit.patch_embed, loose, *([self.places] if self.places is not None else [])]
        return [nn.ModuleList(first), *self.vit.blocks]

    # ---- use
    def layout(self, source: Batch | Spec) -> Layout:
        """The grid of patches of a batch's image or a spec's ``image_size``."""
        if "image" in source:
            height, width = source["image"].shape[-2:]
        else:
            height, width = pair(Spec(source).need("image_size", self), "image_size")
        return Layout.of(Segment("image", patch_grid(height, width, self.patch), self.patch, "image"))

    def normalise(self, image: Tensor) -> Tensor:
        """[0,1] → what the model was made for."""
        return (image - self.mean) / self.std

    def embed(self, batch: Batch) -> Tokens:
        """timm's own embedding: patches, prefix tokens, positions, the norm before the blocks."""
        image, layout = batch["image"], self.layout(batch)
        if image.shape[1] != self.channels:
            raise DataError(f"image has {image.shape[1]} channels, TimmViT was built for {self.channels}")
        if not self.vit.dynamic_img_size and layout.grid != tuple(self.vit.patch_embed.grid_size):
            size, built = "x".join(map(str, image.shape[-2:])), "x".join(map(str, self.vit.patch_embed.img_size))
            raise ConfigError(f"image is {size}, TimmViT({self.model}) was built for {built}: set positions: resample")
        x = self.vit._pos_embed(self.vit.patch_embed(self.normalise(image)))
        x = self.vit.norm_pre(x[0] if isinstance(x, tuple) else x)
        prefix, values = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        if self.places is not None:
            values = values + self.places(layout).to(values.dtype)
        index = torch.arange(layout.cells, device=x.device).expand(len(x), -1)
        return Tokens(values, index, layout, prefix=prefix)

    def encode(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """timm's blocks and norm on all or kept tokens; with a context the same weights, cut."""
        if keep is not None:
            tokens = tokens.take(indices(keep, tokens.values.shape[1]))
        return self._blocks(tokens, self.vit.blocks, self.vit.norm, context, context_update)

    def features(self, batch: Batch, layer: int = -1) -> Tokens:
        """Hidden states before the final norm, after block ``layer`` (0: embedded tokens; -1: last block)."""
        upto = layer_number(layer, len(self.vit.blocks), f"TimmViT({self.model})")
        return self._blocks(self.embed(batch), self.vit.blocks[:upto], nn.Identity())

    def _blocks(
        self,
        tokens: Tokens,
        blocks: Any,
        norm: nn.Module,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        if "context" in self.capabilities:
            return run_tokens(blocks, norm, tokens, context, context_update)
        if context is not None:
            raise ConfigError(f"context can't be restricted: TimmViT {self.lacks('context')}")
        x, rope = tokens.joined(), self._rope(tokens)
        for i, block in enumerate(blocks):
            x = block(x) if rope is None else block(x, rope=rope[i] if isinstance(rope, list) else rope)
        x, prefix = norm(x), tokens.prefix.shape[1]
        return tokens.with_values(x[:, prefix:], x[:, :prefix])

    def _rope(self, tokens: Tokens) -> Tensor | list[Tensor] | None:
        """timm's rotation table, its rows gathered with the tokens; one for each block when they differ."""
        if not self.rotary:
            return None
        rope = self.vit.rope
        cached = not self.vit.dynamic_img_size and getattr(rope, "feat_shape", None) is not None
        table = rope.get_embed() if cached else rope.get_embed(shape=tokens.layout.grid)
        if not getattr(self.vit, "rope_mixed", False):
            return gather(table.expand(len(tokens.index), -1, -1), tokens.index)[:, None]
        heads = table.shape[1]
        index = tokens.index[:, None, :, None].expand(-1, heads, -1, table.shape[-1])
        return [layer.expand(len(index), -1, -1, -1).gather(2, index) for layer in table]

    def to_timm(self) -> TimmWeights:
        """Its own state dict, with positions of ours written into timm's table."""
        rows = None if self.places is None else self.places(self.built_layout)
        given = {"model_name": self.model, **self.given}
        return model_weights(self.vit, given, rows, self.table == "none", *self.scale)

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, and ``patch_values``, the numbers in one patch."""
        return {**super().sizes(), "patch_values": self.channels * self.patch[0] * self.patch[1]}


def refusals(vit: Any) -> tuple[str, str]:
    """Why a timm model can't be a TokenEncoder at all, and why it can't restrict the context; empty if it can."""
    from timm.layers import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    names = " ".join(sorted({type(m).__name__ for m in vit.modules()}))
    if "Window" in names or "MaskUnit" in names:
        return "has window attention", ""
    if "RelPos" in names or any("relative_position" in name for name, _ in vit.named_parameters()):
        return "has relative position bias", ""
    if not isinstance(vit, (VisionTransformer, Eva)):
        convolutional = "Attention" not in names and "Attn" not in names and "Conv2d" in names and "Mixer" not in names
        return f"is a {type(vit).__name__}, {'a convolutional network' if convolutional else 'no plain ViT'}", ""
    stem = vit.patch_embed
    if not isinstance(stem, PatchEmbed):
        return f"has a {type(stem).__name__} stem, which mixes neighbouring patches", ""
    if tuple(stem.proj.kernel_size) != tuple(stem.proj.stride):
        return "has an overlapping stem, which mixes neighbouring patches", ""
    if getattr(vit, "rope", None) is not None:
        return "", "has rotary positions"
    for block in vit.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            attn = type(getattr(block, "attn", None)).__name__
            return "", f"has {type(block).__name__} blocks ({attn})"
    return "", ""


def _capabilities(reason: str, context_reason: str) -> frozenset[str]:
    if reason:
        return frozenset()
    return TimmViT.capabilities - ({"context"} if context_reason else frozenset())
