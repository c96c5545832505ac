"""lightly's masked autoencoder of the same sizes, in the loop that its users write. Runs in its own environment."""

from __future__ import annotations

import torch
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from tests.benchmarks.tokens import BATCH, IMAGES, SIZES, images, optimizer_of
from tests.benchmarks.turns import serve
from timm.models.vision_transformer import VisionTransformer


class Peer(torch.nn.Module):
    """Backbone and decoder as lightly offers them; targets normalised per patch as in the other arms."""

    def __init__(self) -> None:
        super().__init__()
        encoder, decoder = SIZES["encoder"], SIZES["decoder"]
        vit = VisionTransformer(
            img_size=SIZES["image"],
            patch_size=SIZES["patch"],
            embed_dim=encoder["width"],
            depth=encoder["depth"],
            num_heads=encoder["heads"],
            num_classes=0,
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=SIZES["patch"],
            embed_dim=encoder["width"],
            decoder_embed_dim=decoder["width"],
            decoder_depth=decoder["depth"],
            decoder_num_heads=decoder["heads"],
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        length = self.backbone.sequence_length
        keep, rest = utils.random_token_mask((len(image), length), mask_ratio=SIZES["masking"], device=image.device)
        codes = self.decoder.embed(self.backbone.encode(images=image, idx_keep=keep))
        full = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, (len(image), length)), keep, codes)
        made = self.decoder.predict(utils.get_at_index(self.decoder.decode(full), rest))
        wanted = utils.get_at_index(utils.patchify(image, SIZES["patch"]), rest - 1)
        var, mean = torch.var_mean(wanted, -1, keepdim=True)
        return (made - (wanted - mean) / (var + 1e-6).sqrt()).square().mean()


def main() -> None:
    """One step a line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    held, module = images(), Peer()
    optimizer = optimizer_of(module)

    def step() -> float:
        index = torch.randperm(IMAGES)[:BATCH]
        optimizer.zero_grad()
        loss = module(held[index])
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(step)


if __name__ == "__main__":
    main()
