"""The discrete VAE encoder of DALL-E as a target, read from safetensors."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quire.data import expand
from quire.errors import ConfigError
from quire_cae.examples import tiny_run
from quire_cae.frozen import FrozenTarget

GROUPS, BLOCKS = 4, 2
COMMAND = "quire cae-tokenizer encoder.pkl {path}"


class DvaeBlock(nn.Module):
    """A residual block of four convolutions whose branch counts 1 / layers²."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        hidden = outside // 4
        self.id_path = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        sizes = [(inside, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, outside, 1)]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (a, b, kernel) in enumerate(sizes, 1):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = nn.Conv2d(a, b, kernel, padding=kernel // 2)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] → [B,C',h,w]."""
        return self.id_path(x) + self.res_path(x) / (GROUPS * BLOCKS) ** 2


class DvaeEncoder(nn.Module):
    """Pictures → logits over codes, stride 8. Ramesh et al. 2021.

    Args:
        hidden: Channels of the first layer; each of the four groups doubles them.
        codes: V.
        channels: Of the picture.
    """

    def __init__(self, hidden: int = 256, codes: int = 8192, channels: int = 3) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(channels, hidden, 7, padding=3))
        width = hidden
        for g in range(GROUPS):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for b in range(1, BLOCKS + 1):
                group[f"block_{b}"] = DvaeBlock(width, hidden * 2**g)
                width = hidden * 2**g
            if g < GROUPS - 1:
                group["pool"] = nn.MaxPool2d(2)
            layers[f"group_{g + 1}"] = nn.Sequential(group)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(width, codes, 1)))
        self.blocks = nn.Sequential(layers)

    @classmethod
    def like(cls, shapes: Mapping[str, tuple[int, ...]]) -> DvaeEncoder:
        """One whose sizes are those of a state dict's shapes."""
        hidden, channels = shapes["blocks.input.weight"][:2]
        return cls(hidden, shapes["blocks.output.conv.weight"][0], channels)

    def forward(self, image: Tensor) -> Tensor:
        """[B,C,h,w] → [B,V,h/8,w/8]."""
        return self.blocks(image)


class DalleTokenizer(FrozenTarget):
    """Codes of DALL-E's discrete VAE, the paper's target: 8192 codes, stride 8. Ramesh et al. 2021; Chen et al. 2022.

    It sees the same crop as the encoder, resized (the paper's 112 pixels for 14 x 14 patches) and mapped by
    0.8 x + 0.1. Its weights are published as a pickle, which can run code; ``quire cae-tokenizer`` reads the numbers
    out of it without running anything.

    Args:
        path: A safetensors file made by ``quire cae-tokenizer``; ``$QUIRE_DATA`` and ``~`` are expanded.
        size: Height and width of the second view in pixels; null is 8 for each patch.
        codes: Number of codes; null asks the file.

    Returns:
        ids [B,N] int64.

    Raises:
        ConfigError: no such file, a file without the encoder's weights, a grid that isn't the patches'.
    """

    gives_ids: ClassVar[bool] = True
    recorded = "codes"

    def __init__(self, path: str, size: int | list[int] | None = None, codes: int | None = None) -> None:
        super().__init__(size, codes)
        self.path = path

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits with a small random tokenizer, written to a temporary folder."""
        from safetensors.torch import save_file

        path = str(Path(tempfile.mkdtemp()) / "dvae.safetensors")
        torch.manual_seed(0)
        save_file({k: v.contiguous() for k, v in DvaeEncoder(8, 16).state_dict().items()}, path)
        return tiny_run({"class_path": "DalleTokenizer", "init_args": {"path": path}})

    def stride(self) -> int:
        """8."""
        return 2 ** (GROUPS - 1)

    def given(self) -> int:
        """V, from the file's header."""
        return self._shapes()["blocks.output.conv.weight"][0]

    def read(self) -> DvaeEncoder:
        """The encoder with its weights."""
        from safetensors.torch import load_model

        net = DvaeEncoder.like(self._shapes())
        load_model(net, str(expand(self.path)))
        return net

    def look(self, net: Any, view: Tensor) -> Tensor:
        """[B,h',w'] ids."""
        return net(0.8 * view + 0.1).argmax(1)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        from safetensors import SafetensorError, safe_open

        file = expand(self.path)
        if not file.is_file():
            raise ConfigError(
                f"DalleTokenizer.path: there is no file {file}; make it once with: {COMMAND.format(path=file)}"
            )
        try:
            with safe_open(str(file), "pt") as content:
                shapes = {k: tuple(content.get_slice(k).get_shape()) for k in content.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"DalleTokenizer.path: {file} is no safetensors file, or is truncated") from error
        lacking = set(DvaeEncoder(4, 1).state_dict()) - {*shapes} if len(shapes) < 10 else set()
        if lacking or not {"blocks.input.weight", "blocks.output.conv.weight"} <= set(shapes):
            raise ConfigError(
                f"DalleTokenizer.path: {file} doesn't hold a discrete VAE encoder; make it with: "
                f"{COMMAND.format(path=file)}"
            )
        return shapes
