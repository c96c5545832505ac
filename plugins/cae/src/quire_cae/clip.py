"""Features of a CLIP image encoder as a target: the sequel's choice."""

from __future__ import annotations

import tempfile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quire.data import expand
from quire.errors import ConfigError
from quire_cae.examples import tiny_run
from quire_cae.frozen import FrozenTarget

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipTarget(FrozenTarget):
    """Patch features of a CLIP image encoder, compared by cosine. Radford et al. 2021; as in CAE v2, Zhang et al. 2022.

    It sees the same crop as the encoder, resized so that its patches fall on the encoder's, under CLIP's own mean and
    deviation. Features are those after the last block and the final norm, before the projection.

    Args:
        path: A folder that transformers wrote with a CLIP vision model in it; ``$QUIRE_DATA`` and ``~`` are expanded.
        size: Height and width of the second view in pixels; null fits the patch grid.
        width: Numbers in a feature; null asks the folder.

    Returns:
        [B,N,F] float32.

    Raises:
        ConfigError: transformers is missing, no CLIP vision model in the folder, a grid that isn't the patches'.
    """

    distance: ClassVar[str] = "cosine"

    def __init__(self, path: str, size: int | list[int] | None = None, width: int | None = None) -> None:
        super().__init__(size, width)
        self.path = path

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits with a small random CLIP, written to a temporary folder."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        torch.manual_seed(0)
        folder = tempfile.mkdtemp()
        CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(folder)
        return tiny_run({"class_path": "ClipTarget", "init_args": {"path": folder}})

    def _config(self) -> Any:
        try:
            from transformers import CLIPConfig, CLIPVisionConfig
        except ImportError as error:
            raise ConfigError("ClipTarget needs transformers: pip install transformers") from error
        folder = expand(self.path)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"ClipTarget.path: there is no config.json in {folder}: save a CLIP vision model there")
        try:
            whole, _ = CLIPConfig.get_config_dict(str(folder))
        except (OSError, ValueError) as error:
            raise ConfigError(f"ClipTarget.path: {folder}/config.json can't be read") from error
        kind = whole.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise ConfigError(f"ClipTarget.path: {folder} holds a {kind} model, not CLIP's image encoder")
        return CLIPVisionConfig.from_pretrained(str(folder), local_files_only=True)

    def stride(self) -> int:
        """CLIP's patch size."""
        return int(self._net_config().patch_size)

    def _net_config(self) -> Any:
        net = self.__dict__["net"]
        return self._config() if net is None else net.config

    def given(self) -> int:
        """CLIP's width."""
        return int(self._config().hidden_size)

    def read(self) -> nn.Module:
        """The image encoder."""
        from transformers import CLIPVisionModel

        self._config()
        return CLIPVisionModel.from_pretrained(str(expand(self.path)), local_files_only=True)

    def look(self, net: Any, view: Tensor) -> Tensor:
        """[B,h',w',F]."""
        mean, std = (torch.tensor(v, device=view.device).view(3, 1, 1) for v in (MEAN, STD))
        found = net(pixel_values=(view - mean) / std, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        norm = getattr(net, "post_layernorm", None) or net.vision_model.post_layernorm
        rows = view.shape[-2] // net.config.patch_size
        return norm(found).unflatten(1, (rows, -1))
