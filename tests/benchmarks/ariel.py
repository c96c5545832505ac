"""A sentence to a box and back: the time of both beside one teacher-forced pass of the language model."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, one_thread, race, table

from quire.contracts import Spec, build
from quire.plugins import load
from quire.recipe import instantiate

SENTENCES, DIMS = 1000, 16
MODELS: dict[str, dict[str, Any]] = {
    "GRU 48/128": {"class_path": "GRULanguageModel", "init_args": {"width": 128, "embedding": 48}},
    "LSTM 48/128": {"class_path": "LSTMLanguageModel", "init_args": {"width": 128, "embedding": 48}},
    "CausalLM 128 x 4": {"class_path": "CausalLM", "init_args": {"width": 128, "depth": 4, "heads": 4}},
}


def scored(model: Any, batches: list[dict[str, Any]]) -> None:
    """The language model's own pass over the sentences, in the data's batches."""
    with torch.no_grad():
        for batch in batches:
            model(None, batch["tokens"][:, :-1], batch["mask"][:, :-1])


def main() -> None:
    """Print the three times, the ratio of encoding plus decoding to the pass, and how many sentences came back."""
    if "ariel" not in load().records:
        print("\nAriEL: plugin ariel is not installed")
        return
    load().registry.import_named(["VolumeDecoder", "QuestionGrammar", *(m["class_path"] for m in MODELS.values())])
    from quire_ariel.data import QuestionGrammar

    data = QuestionGrammar(sentences=SENTENCES)
    batches = list(data.loader("train"))
    whole = data.dataset("train").__getitems__(list(range(SENTENCES)))  # type: ignore[attr-defined]
    rows = [["language model", "one pass, ms", "encode, ms", "decode, ms", "ratio", "same sentences"]]
    with one_thread():
        for name, how in MODELS.items():
            torch.manual_seed(0)
            arguments = {"language_model": how, "latent_dim": DIMS}
            cube: Any = instantiate({"class_path": "VolumeDecoder", "init_args": arguments})
            build(cube, Spec(data.spec))
            train(cube, batches)
            held: dict[str, Any] = {}
            arms = {
                "pass": lambda c=cube: scored(c.language_model, batches),
                "encode": lambda c=cube, h=held: h.update(codes=c.encode(whole["tokens"], whole["mask"])),
                "decode": lambda c=cube, h=held: h.update(said=c.decode(h["codes"]).rows()),
            }
            spent = race(arms, repeats=7, warmup=2)
            both = [a + b for a, b in zip(spent["encode"], spent["decode"])]
            meant = [t[m].tolist()[1:] for t, m in zip(whole["tokens"], whole["mask"])]
            same = sum(a == b for a, b in zip(held["said"], meant))
            ratio = f"{median(both) / median(spent['pass']):.2f} ({min(both) / min(spent['pass']):.2f})"
            rows.append([name, *(milliseconds(spent[a]) for a in arms), ratio, f"{same} of {SENTENCES}"])
    title = f"AriEL: {SENTENCES} sentences to boxes of {DIMS} axes and back; ratio to one teacher-forced pass"
    table(f"{title} (wanted: at most 3)", rows)


def train(cube: Any, batches: list[dict[str, Any]], epochs: int = 6) -> None:
    """A few steps, so that sentences are likely enough to fit."""
    optimizer = torch.optim.Adam(cube.parameters(), lr=2e-3)
    for batch in batches * epochs:
        tokens, mask = batch["tokens"], batch["mask"]
        logits = cube(None, tokens[:, :-1], mask[:, :-1])
        wanted = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cube.eval()


if __name__ == "__main__":
    main()
