"""The key-value bottleneck: a step with cached indices beside one that projects and looks up, losses compared."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from tests.benchmarks.clock import Arms, milliseconds, one_thread, ratio, table

WIDTH, BATCH, CLASSES, SAMPLES = 512, 256, 10, 1024
MANY = 10
"""Cached steps in one turn: the other arm leaves the processor's caches cold."""
SIZES = {"C=64, M=1024, d=8": (64, 1024, 8), "paper: C=256, M=4096, d=14": (256, 4096, 14)}


def made(codebooks: int, keys: int, width: int, cache: bool) -> Any:
    """Model, its optimizer and its batches: features from a frozen encoder that costs nothing."""
    from quire.model import Model
    from quire.roles.latent.plain import FlatPixels
    from quire.roles.probes.classify import Classify
    from quire_dkvb.decoders import CodebookVote
    from quire_dkvb.encoder import KeyValueBottleneck

    torch.manual_seed(0)
    bottleneck = KeyValueBottleneck(FlatPixels(), codebooks, keys, width)
    spec = {"image_size": [1, WIDTH], "channels": 1, "classes": CLASSES}
    model = Model(bottleneck, CodebookVote(), Classify(label_smoothing=0.1), spec=spec)
    model.configure_model()
    features = torch.rand(SAMPLES, 1, 1, WIDTH)
    label = torch.randint(CLASSES, (SAMPLES,))
    with torch.no_grad():
        heads = bottleneck.project(features[:64].flatten(1))
        bottleneck.initialised(heads.mean(0)[:, None] + heads.std(0)[:, None] * torch.randn(codebooks, keys, width))
    if cache:
        bottleneck.remember(SAMPLES)
    index = torch.arange(SAMPLES).split(BATCH)
    batches = [{"image": features[i], "label": label[i], "index": i} for i in index]
    return model.train(), torch.optim.SGD([bottleneck.values], lr=0.3), batches


def stepper(codebooks: int, keys: int, width: int, cache: bool, losses: list[float]) -> Any:
    """One training step, a batch after the other: forward, backward, clip, update. The cache is warm."""
    model, optimizer, batches = made(codebooks, keys, width, cache)
    if cache:
        for batch in batches:
            model.encoder(batch)
    turn = iter(range(10**9))

    def step() -> None:
        batch = batches[next(turn) % len(batches)]
        loss = model.objective(model, batch)["classify"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([model.encoder.values], 1.0)
        optimizer.step()
        losses.append(loss.item())

    return step


def main(repeats: int = 7) -> None:
    """Print both sizes."""
    from tests.benchmarks.clock import race

    from quire.plugins import load

    if "dkvb" not in load().records:
        print("\nKey-value bottleneck: plugin dkvb is not installed")
        return
    rows = [["", "cached, ms", "uncached, ms", "gain", "largest difference of losses", "cache, bytes a sample"]]
    with one_thread():
        for name, sizes in SIZES.items():
            losses: dict[str, list[float]] = {"cached": [], "uncached": []}
            steps = {arm: stepper(*sizes, arm == "cached", losses[arm]) for arm in losses}
            arms = {"cached": lambda s=steps["cached"]: [s() for _ in range(MANY)], "uncached": steps["uncached"]}
            spent: Arms = race(arms, repeats=repeats, warmup=2)
            spent["cached"] = [t / MANY for t in spent["cached"]]
            apart = max(abs(a - b) for a, b in zip(losses["cached"], losses["uncached"]))
            assert median(spent["cached"]) > 0
            gain = ratio(spent["uncached"], spent["cached"])
            rows.append([name, *(milliseconds(spent[a]) for a in losses), gain, f"{apart:.1g}", str(2 * sizes[0])])
    table(f"Key-value bottleneck: a step of {BATCH} samples of {WIDTH} features", rows)


if __name__ == "__main__":
    main()
