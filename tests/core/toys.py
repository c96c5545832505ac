"""Small parts for the core's own tests: a linear encoder on vectors, heads, a two-player objective, a sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quire import DataModule, Decoder, Encoder, Fields, Losses, Metric, Objective, Sampler


class Toy(DataModule):
    """256 points in 8 dimensions; the class is the sign of the first coordinate."""

    fields = ("vector", "label")

    def split(self, name: str) -> Fields:
        count = {"train": 256, "val": 64, "test": 50}[name]
        x = torch.randn(count, 8, generator=torch.Generator().manual_seed(len(name)))
        return Fields(vector=x, label=(x[:, 0] > 0).long())

    def sizes(self) -> dict[str, Any]:
        return {"width": 8, "classes": 2}


class Line(Encoder):
    """A linear layer with dropout."""

    fields = ("vector",)

    def __init__(self, out: int = 4, inner: Encoder | None = None) -> None:
        super().__init__()
        self.out, self.inner = out, inner

    def build(self, spec: Any) -> None:
        super().build(spec)
        self.linear = nn.Linear(spec.need("width", self), self.out)
        self.norm = nn.LayerNorm(self.out)
        self.drop = nn.Dropout(0.2)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.drop(self.norm(self.linear(batch["vector"])))

    def sizes(self) -> dict[str, Any]:
        return {"width": self.out}

    def layers(self) -> list[nn.Module]:
        return [self.linear, self.norm]


class Wide(Line):
    """The role that Picky asks for."""

    capabilities = frozenset({"wide"})


class Guess(Objective):
    """Classify from the codes with a head of its own."""

    encoder: Encoder
    fields = ("label",)

    def __init__(self, weight: float = 1.0, term: str = "guess") -> None:
        super().__init__()
        self.term = term
        self.weights = {term: weight}

    def build(self, spec: Any) -> None:
        self.head = nn.Linear(spec.code("width", self), spec.need("classes", self))

    def forward(self, model: Any, batch: Any) -> Losses:
        logits = self.head(model.encoder(batch))
        accuracy = lambda: (logits.argmax(1) == batch["label"]).float().mean()  # noqa: E731
        return Losses({self.term: cross_entropy(logits, batch["label"])}, {"accuracy": accuracy}, {"logits": logits})


class Picky(Guess):
    """Needs an encoder that is Wide and can 'wide'."""

    encoder: Wide
    requires = {"encoder": frozenset({"wide"})}


class Rebuild(Decoder):
    """Codes → the vector."""

    def build(self, spec: Any) -> None:
        self.linear = nn.Linear(spec.code("width", self), spec.need("width", self))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.linear(codes)


class Duel(Objective):
    """A rebuilding player against a critic."""

    encoder: Encoder
    decoder: Rebuild
    players = ("maker", "critic")

    def build(self, spec: Any) -> None:
        self.judge = nn.Linear(spec.need("width", self), 1)

    def parameters_of(self, model: Any, player: str) -> Any:
        return (
            [*model.encoder.parameters(), *model.decoder.parameters()] if player == "maker" else self.judge.parameters()
        )

    def forward(self, model: Any, batch: Any, player: str) -> Losses:
        made = model.decoder(model.encoder(batch))
        if player == "maker":
            return Losses({"rebuild": (made - batch["vector"]).square().mean(), "fool": -self.judge(made).mean()})
        return Losses({"critic": self.judge(made.detach()).mean() - self.judge(batch["vector"]).mean()})


class Ascend(Sampler):
    """One gradient step on the codes' norm; its answer over the whole set is a list of rows."""

    encoder: Encoder
    needs_grad = True

    def forward(self, model: Any, batch: Any) -> list[dict[str, Any]]:
        x = batch["vector"].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model.encoder({"vector": x}).square().sum(), x)
        return [{"index": int(i), "slope": float(s.norm())} for i, s in zip(batch["index"], slope)]


class Steepness(Metric):
    """Mean slope of Ascend's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, slopes: torch.Tensor) -> None:
        self.total += slopes.sum()
        self.count += slopes.numel()

    def compute(self) -> torch.Tensor:
        return self.total / self.count

    def sampled(self, model: Any, batch: Any, results: Any) -> None:
        self.update(torch.tensor([row["slope"] for row in results]))
