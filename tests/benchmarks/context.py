"""What MP3 saves by keeping only the context's keys and values: masking 0.75 over 0, beside the operation count."""

from __future__ import annotations

from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, one_thread, race, ratio, table

from quire import Model, Spec
from quire.plugins import load
from quire.recipe import instantiate

WIDTH, DEPTH, PATCH, MASKING = 192, 6, 4, 0.75


def multiply_adds(tokens: int, context: int) -> float:
    """Of one token through stem, blocks and head; forward, to which backward is proportional."""
    projections = 2 * WIDTH**2 + 2 * WIDTH**2 * context / tokens  # queries and output of all, keys and values of some
    block = projections + 2 * context * WIDTH + 8 * WIDTH**2  # scores and sums over the context, then the MLP
    return 3 * PATCH**2 * WIDTH + DEPTH * block + WIDTH * tokens


def mp3(side: int, masking: float) -> Model:
    """A ViT without positions and the objective, built for square images."""
    trunk = {"patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": 3, "positions": "none"}
    load().registry.import_named(["ViTEncoder", "PositionPrediction"])
    torch.manual_seed(0)
    model = Model(
        encoder=instantiate({"class_path": "ViTEncoder", "init_args": trunk}),
        objective=instantiate(
            {"class_path": "PositionPrediction", "init_args": {"masking": masking, "pictures": 0}},
        ),
        spec=Spec(image_size=side, channels=3),
    )
    model.configure_model()
    return model.train()


def pass_of(model: Model, batch: dict[str, Any]) -> Any:
    """A function that goes forward and backward once."""

    def run() -> None:
        model.zero_grad()
        model.objective(model, batch)["position"].backward()

    return run


def main(repeats: int = 7) -> None:
    """Print both lengths."""
    if "mp3" not in load().records:
        print("\nContext: plugin mp3 is not installed")
        return
    rows = [["tokens", f"masking {MASKING}, ms", "masking 0, ms", "ratio", "by operation count"]]
    with one_thread():
        for tokens, batch_size in ((64, 32), (784, 2)):
            side = round(tokens**0.5) * PATCH
            batch = {"image": torch.rand(batch_size, 3, side, side)}
            spent = race({str(m): pass_of(mp3(side, m), batch) for m in (MASKING, 0.0)}, repeats)
            some, all_ = spent[str(MASKING)], spent["0.0"]
            context = tokens - int(MASKING * tokens)
            counted = multiply_adds(tokens, context) / multiply_adds(tokens, tokens)
            rows.append([str(tokens), milliseconds(some), milliseconds(all_), ratio(some, all_), f"{counted:.3f}"])
    table(f"MP3, forward and backward, width {WIDTH}, depth {DEPTH}; median (minimum)", rows)


if __name__ == "__main__":
    main()
