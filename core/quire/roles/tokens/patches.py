"""Images to patches and back."""

from __future__ import annotations

from torch import Tensor

from quire.errors import ConfigError


def patch_grid(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches. Raises ``ConfigError`` when the patch doesn't divide the image."""
    if height % patch[0] or width % patch[1]:
        raise ConfigError(f"image {height}x{width} is not divisible by patch {patch[0]}x{patch[1]}; pad or resize")
    return height // patch[0], width // patch[1]


def patchify(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B,C,H,W] → [B,N,C*ph*pw], patches in row-major order, values channel first as in a convolution's kernel."""
    batch, channels, height, width = image.shape
    rows, columns = patch_grid(height, width, patch)
    cells = image.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """[B,N,C*ph*pw] → [B,C,H,W]; undoes ``patchify``."""
    cells = patches.reshape(len(patches), *grid, -1, *patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(len(patches), cells.shape[1], grid[0] * patch[0], grid[1] * patch[1])


def pair(size: int | list[int] | tuple[int, ...], name: str) -> tuple[int, int]:
    """A size as (height, width). Raises ``ConfigError`` for anything but one or two positive integers."""
    made = (size, size) if isinstance(size, int) else tuple(size)
    if len(made) != 2 or any(not isinstance(s, int) or s < 1 for s in made):
        raise ConfigError(f"{name} must be a positive integer or a pair of them, got {size}")
    return made  # type: ignore[return-value]
