"""Sentences of random points judged by a grammar, and held-out ones said again. For Celotti et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric
from quire.errors import ConfigError
from quire_ariel.decoder import VolumeDecoder
from quire_ariel.grammar import SPECIAL, Grammar, questions
from quire_ariel.measures import Words, fidelity, interval, marks, variety, words_of
from quire_ariel.speaking import said_again

BORDER = -1


class _Judged(Metric):
    """Gathers rows of ids, one behind the other with a border between; a grammar reads them."""

    higher_is_better = True
    full_state_update = False
    said: list[Tensor]

    def __init__(self, grammar: str | None = None) -> None:
        super().__init__()
        if grammar is not None:
            named(grammar, self)
        self.grammar = grammar
        self.add_state("said", [], dist_reduce_fx="cat")
        self.rules: Grammar | None = None
        self.known: set[Words] = set()
        self.ends: tuple[int, ...] = ()

    def _look(self, model: Any) -> None:
        """What the data says of sentences."""
        if self.ends:
            return
        source = model.datamodule
        self.rules = named(self.grammar, self) if self.grammar else getattr(source, "grammar", None)
        drawn = getattr(source, "drawn", None)
        self.known = set() if drawn is None else {tuple(s) for s in drawn()["train"]}
        self.ends = (int(model.spec["eos"]),)

    def need(self) -> Grammar:
        """The grammar. Raises ``ConfigError`` when there is none."""
        if self.rules is None:
            raise ConfigError(
                f"{type(self).__name__} needs a grammar: set grammar: questions, or data: QuestionGrammar"
            )
        return self.rules

    def update(self, rows: Sequence[Sequence[int]]) -> None:
        """Add rows of ids, the end token included."""
        self.said.append(torch.tensor([i for row in rows for i in (*row, BORDER)], device=self.device))

    def rows(self) -> list[list[int]]:
        """Everything gathered; of this process, unless ``compute`` has called it."""
        flat = torch.cat(self.said) if isinstance(self.said, list) and self.said else self.said
        found: list[list[int]] = [[]]
        for i in flat.tolist() if isinstance(flat, Tensor) else flat:
            if i == BORDER:
                found.append([])
            else:
                found[-1].append(int(i))
        return found[:-1]


class _Drawn(_Judged):
    """Judges sentences of uniform points: in validation as many as the batch has rows, in predict the sampler's."""

    decoder: VolumeDecoder

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Questions of the small grammar."""
        from quire_ariel.decoder import tiny_volume

        return tiny_volume(metrics=[cls.__name__])

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Draw, or take what another metric has drawn."""
        self._look(model)
        if "drawn" not in losses.outputs:
            cube: VolumeDecoder = model.decoder.role(VolumeDecoder)
            shape = (len(batch["tokens"]), cube.latent_dim)
            points = torch.rand(shape, dtype=torch.float64, generator=model.generator("cpu"))
            losses.outputs["drawn"] = cube.decode(points).rows()
        self.update(losses.outputs["drawn"])

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """Read what UniformCube drew; other results hold no sentences."""
        self._look(model)
        if isinstance(results, list) and results and "tokens" in results[0]:
            self.update([row["tokens"] for row in results])

    def sentences(self) -> list[Words]:
        """Everything gathered, as words of the grammar."""
        return words_of(self.rows(), self.need().words, SPECIAL, self.ends)

    def table(self) -> dict[str, float]:
        """Every number of ``variety`` by name, and the ends of the 95 % intervals of two of them."""
        drawn, rules = self.sentences(), self.need()
        found = variety(drawn, rules, self.known)
        for name, each in marks(drawn, rules).items():
            found[f"{name}, low"], found[f"{name}, high"] = interval(each)
        return found


class GrammarValidity(_Drawn):
    """Share of generated sentences that the grammar accepts. For Celotti et al. 2020.

    Args:
        grammar: ``questions``, ``questions:SIZE``, or null for the data's own.

    Returns:
        A scalar in [0, 1].

    Raises:
        ConfigError: no grammar.
    """

    def compute(self) -> Tensor:
        """Valid ones over all."""
        return torch.tensor(variety(self.sentences(), self.need(), self.known)["valid"])


class Uniqueness(_Drawn):
    """Different generated sentences over all. For Celotti et al. 2020.

    With a grammar ``table`` also has the valid ones among them, those not in training, and coverages.

    Args:
        grammar: ``questions``, ``questions:SIZE``, or null for the data's own, or none.

    Returns:
        A scalar in [0, 1]. It depends on how many are drawn.

    Raises:
        ConfigError: an unknown grammar.
    """

    def compute(self) -> Tensor:
        """Different ones over all."""
        rows = [tuple(row) for row in self.rows()]
        return torch.tensor(len(set(rows)) / max(1, len(rows)))


class GrammarCoverage(_Drawn):
    """Productions of the grammar that valid generated sentences use, over all productions. For Celotti et al. 2020.

    Args:
        grammar: ``questions``, ``questions:SIZE``, or null for the data's own.

    Returns:
        A scalar in [0, 1].

    Raises:
        ConfigError: no grammar.
    """

    def compute(self) -> Tensor:
        """Those used over all."""
        return torch.tensor(variety(self.sentences(), self.need(), self.known)["grammar"])


class VocabularyCoverage(_Drawn):
    """Words that valid generated sentences use, over all words of the grammar. For Celotti et al. 2020.

    Args:
        grammar: ``questions``, ``questions:SIZE``, or null for the data's own.

    Returns:
        A scalar in [0, 1].

    Raises:
        ConfigError: no grammar.
    """

    def compute(self) -> Tensor:
        """Those used over all."""
        return torch.tensor(variety(self.sentences(), self.need(), self.known)["vocabulary"])


class ReconstructionExact(_Judged):
    """Share of sentences of validation or test that are encoded and decoded to themselves. For Celotti et al. 2020.

    By the cube, or by an encoder of vectors and a decoder that reads one, greedily. ``table`` also has the share of
    tokens in their place and, with a grammar, of valid answers.

    Args:
        grammar: ``questions``, ``questions:SIZE``, or null for the data's own, or none.

    Returns:
        A scalar in [0, 1].

    Raises:
        ConfigError: a model with neither a cube nor an encoder.
    """

    right: Tensor
    total: Tensor

    def __init__(self, grammar: str | None = None) -> None:
        super().__init__(grammar)
        self.add_state("right", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Questions of the small grammar."""
        from quire_ariel.decoder import tiny_volume

        return tiny_volume(metrics=[cls.__name__])

    def check(self, model: Any) -> None:
        """Something must encode."""
        if model.encoder is None and (model.decoder is None or model.decoder.role(VolumeDecoder) is None):
            raise ConfigError("ReconstructionExact needs a VolumeDecoder, or an encoder of vectors: set model.encoder")

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Encode and decode the batch."""
        self._look(model)
        mask = batch["mask"] if "mask" in batch else torch.ones_like(batch["tokens"], dtype=torch.bool)
        meant = [t[m].tolist()[1:] for t, m in zip(batch["tokens"], mask)]  # behind the start token
        said = said_again(model, batch, max(map(len, meant)) + 1)
        found = fidelity(said, meant)
        counts = torch.tensor([len(meant), sum(max(len(a), len(b)) for a, b in zip(said, meant))], dtype=torch.float64)
        self.right += counts.to(self.right) * torch.tensor([found["exact"], found["tokens"]]).to(self.right)
        self.total += counts.to(self.total)
        self.update(said)

    def compute(self) -> Tensor:
        """Whole sentences right over all."""
        return (self.right[0] / self.total[0].clamp(min=1)).float()

    def table(self) -> dict[str, float]:
        """``exact``, ``tokens`` and, with a grammar, ``valid``."""
        shares = (self.right / self.total.clamp(min=1)).tolist()
        found = {"exact": shares[0], "tokens": shares[1]}
        if self.rules is not None:
            again = words_of(self.rows(), self.rules.words, SPECIAL, self.ends)
            found["valid"] = sum(map(self.rules.valid, again)) / max(1, len(again))
        return found


def named(name: str, asker: object) -> Grammar:
    """``questions``, or ``questions:SIZE`` with a larger vocabulary. Raises ``ConfigError`` for another name."""
    first, _, size = name.partition(":")
    if first != "questions" or (size and not size.isdigit()):
        raise ConfigError(f"{type(asker).__name__}.grammar is questions or questions:SIZE, got {name!r}")
    return questions(int(size)) if size else questions()
