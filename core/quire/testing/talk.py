"""A step model on a bench: built, in eval mode, weights large enough that what it does shows, a few prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Codes
from quire.roles.language.contract import Draft, Drafter, StepModel, codes_of
from quire.roles.language.loop import Greedy
from quire.roles.language.proof import batch_of
from quire.roles.language.rows import padded, prompts_of
from quire.testing.assembly import trainer_of
from quire.testing.bench import first_rows
from quire.testing.quiet import quietly
from quire.testing.subject import Subject
from quire.testing.trial import first_batch, needed, size_of
from quire.testing.verdict import Skip

ROWS = 4
LENGTHS = (3, 7, 2, 5)


@dataclass
class Talk:
    """What the language checks work with.

    Attributes:
        name: Short name of the component under test.
        model: The whole model of its tiny run.
        target: Its step model.
        batch: Four samples of its data, for what a seq2seq decoder reads.
        codes: Their codes, None for a decoder-only model.
    """

    name: str
    model: Any
    target: StepModel
    batch: Batch
    codes: Codes | None

    def ids(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Random ids [rows,length], without end, padding and start."""
        caps = self.target.caps()
        usual = [i for i in range(caps.vocab_size) if i not in (*caps.eos_ids, caps.pad_id, caps.start_id)]
        chosen = torch.randint(0, len(usual), (rows, length), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(usual)[chosen]

    def prompts(self, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
        """Ragged prompts that leave the model room for twelve tokens."""
        most = self.target.caps().positions_max
        room = max(lengths) if most is None else max(1, most - 12)
        return [self.ids(1, min(n, room), seed + i)[0].tolist() for i, n in enumerate(lengths)]

    def fields(self, rows: int) -> Batch:
        """What an encoder reads, for any number of rows: the samples of its data over and over."""
        again = torch.arange(rows) % ROWS
        own = ("tokens", "mask", "index", "prompt_length", "source_span", "doc")
        return {k: v[again] for k, v in self.batch.items() if isinstance(v, Tensor) and v.ndim and k not in own}

    def given(self, prompts: list[list[int]]) -> Batch:
        """A batch of prompts, with what the encoder reads; behind a source prompts are not read."""
        return batch_of(prompts, self.target, self.fields(len(prompts)))


def talk(subject: Subject) -> Talk:
    """The tiny run of a step model, drafter or acceptance rule, ready to be tried. Raises ``Skip`` without one."""
    made = needed(lambda: subject.trial.spare(), "constructs")
    model = made.model
    target = None if model.decoder is None else model.decoder.role(StepModel)
    if target is None:
        raise Skip("no step model in its tiny run")
    with quietly():
        few = first_rows(first_batch(made.data), ROWS)
    if size_of(few) < ROWS:
        raise Skip(f"its tiny run's batch has fewer than {ROWS} rows")
    enlarge(model)
    model.eval()
    with quietly():
        trainer = trainer_of(made, [], logger=False)
    model.trainer = trainer
    trainer.datamodule = made.data  # type: ignore[attr-defined]  # a drafter may count the run's training tokens
    with torch.no_grad():
        codes = codes_of(model, few) if "source" in few or model.encoder is not None else None
    return Talk(subject.name, model, target, few, codes)


def enlarge(model: nn.Module) -> None:
    """Draw every matrix anew and large: small weights hide wrong positions, and untrained models repeat themselves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


class Adversary(Drafter):
    """Random trees that are partly right: wide and narrow ones, one with an end inside, and single nodes.

    Args:
        truth: Greedy's ids for each row.
        starts: Length of each prompt.
        vocab: Ids are below this.
        ends: End tokens.
        trees: False proposes chains only.
    """

    def __init__(
        self, truth: list[list[int]], starts: list[int], vocab: int, ends: list[int], trees: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.truth, self.starts, self.vocab, self.ends, self.trees = truth, starts, vocab, ends, trees
        self.source = random.Random(seed)

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """One of the kinds of tree, at random."""
        rest = self.truth[row][len(context) - self.starts[row] :]
        kind = self.source.randrange(5)
        if kind == 0 or not rest:
            return Draft([self._any()], [-1])  # one node that is hardly ever right
        if kind == 1:
            return None
        tokens: list[int] = []
        parents: list[int] = []
        above = -1
        for right in rest[:5]:
            wide = self.trees and self.source.random() < 0.7
            tokens += [self._any()] if wide else []
            parents += [above] if wide else []
            wrong = self.source.random() < 0.2
            tokens.append(self._any() if wrong else right)
            parents.append(above)
            above = len(tokens) - 1
        return Draft(tokens, parents).cut(len(tokens), budget)

    def _any(self) -> int:
        if self.ends and self.source.random() < 0.3:
            return self.source.choice(self.ends)
        return self.source.randrange(self.vocab)


def adversary(it: Talk, prompts: list[list[int]], count: int, seed: int = 0) -> Adversary:
    """The adversary of these prompts: it knows what greedy decoding says."""
    given, caps = it.given(prompts), it.target.caps()
    truth = [row[0] for row in Greedy(count)(it.model, given).tokens]
    starts = [len(p) for p in prompts_of(given, caps)]
    return Adversary(truth, starts, caps.vocab_size, list(caps.eos_ids), caps.tree_mask, seed)


def opened(
    it: Talk, prompts: list[list[int]], side: str = "right", rows: list[int] | None = None, draft: Tensor | None = None
) -> Any:
    """A state behind padded prompts, of some rows of the codes; with ``draft`` what ``open_drafted`` gives."""
    ids, mask = padded(prompts, it.target.caps().pad_id, torch.device("cpu"))
    if side == "left" and mask is not None:
        order = [[*range(len(p), ids.shape[1]), *range(len(p))] for p in prompts]
        ids, mask = ids.gather(1, torch.tensor(order)), mask.gather(1, torch.tensor(order))
    from quire.roles.language.rows import select

    codes = None if it.codes is None else select(it.codes, rows or list(range(len(prompts))), ROWS)
    if draft is not None:
        return it.target.open_drafted(draft, ids, mask, codes, ids.shape[1] + 24)
    return it.target.open(ids, mask, codes, max_length=ids.shape[1] + 24)
