"""Draft by copying the source from where the output has got to: input-guided aggressive decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, DataError
from quire.roles.language.contract import Draft, Drafter, StepModel

if TYPE_CHECKING:
    from quire.model import Model

MULTIPLE = ("unique", "nearest", "tree")
NOWHERE = -1
EIGHT, FADE = 8, 0.97


class SourceCopy(Drafter):
    """Guess that the output goes on like the source, to its end; find the place again behind each edit. Ge et al. 2022.

    For outputs that resemble their inputs: correction, simplification, rewriting. The source is the batch's ``source``,
    or the slice ``source_span`` of the prompt. Nothing is trained; under ``Exact`` the output is plain decoding's.
    With ``resume: false, adapt: false`` it is the paper's rule.

    Args:
        max_gram: Longest run of output tokens looked up in the source, at least 1; shorter ones are tried first.
        max_draft: Most tokens of a draft; null: to the end of the source.
        multiple: Where a run of ``max_gram`` tokens has several places: ``unique`` drafts nothing, ``nearest`` takes
            the one closest to where copying would have got to, ``tree`` drafts behind all of them.
        resume: Where no place is found, go on as if one token had been replaced. Ours.
        adapt: Begin as for one edit in ten tokens, and lengthen or shorten drafts by the stretches that this row has
            copied. Ours.
        id_map: Source id → output id, a mapping or a list by source id, where the two vocabularies differ. Ids
            that it does not name are never copied.

    Raises:
        ConfigError: an argument out of range, two vocabularies without ``id_map``, or data without a source.
        DataError: a source that begins with padding.
    """

    fields = ("source|source_span",)

    def __init__(
        self,
        max_gram: int = 3,
        max_draft: int | None = None,
        multiple: str = "unique",
        resume: bool = True,
        adapt: bool = True,
        id_map: dict[int, int] | list[int] | None = None,
    ) -> None:
        super().__init__()
        if max_gram < 1 or (max_draft is not None and max_draft < 1):
            raise ConfigError(f"SourceCopy needs max_gram and max_draft of at least 1, got {max_gram} and {max_draft}")
        if multiple not in MULTIPLE:
            raise ConfigError(f"SourceCopy.multiple is {', '.join(MULTIPLE)}, got {multiple!r}")
        self.max_gram, self.max_draft, self.multiple = max_gram, max_draft, multiple
        self.resume, self.adapt = resume, adapt
        self.id_map = None if id_map is None else _as_map(id_map)
        self._rows: dict[int, Alignment] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Copy digit strings."""
        small = {"width": 16, "depth": 1, "heads": 2}
        encoder = {"class_path": "TextEncoder", "init_args": {**small, "positions": "sincos", "lm_head": False}}
        sampler = {"class_path": "Speculative", "init_args": {"drafter": cls.__name__, "max_new_tokens": 8}}
        task = {"task": "copy", "train_length": 6, "test_length": 6, "samples": 64, "batch_size": 16}
        return {
            "model": {
                "encoder": encoder,
                "decoder": {"class_path": "Seq2SeqDecoder", "init_args": small},
                "objective": "Seq2SeqTokens",
                "sampler": sampler,
            },
            "data": {"class_path": "Algorithmic", "init_args": task},
        }

    def bind(self, model: Model) -> None:
        """Refuse two vocabularies, and beams."""
        super().bind(model)
        if getattr(model.sampler, "beams", 1) > 1:
            raise ConfigError("Aggressive decoding is defined for greedy, not beams: use Speculative")
        spec: dict[str, Any] = model.spec or {}
        encoder = model.encoder.sizes() if model.encoder is not None else {}
        ours = spec.get("source_vocab_size") or encoder.get("vocab_size")
        decoder = model.decoder.role(StepModel) if model.decoder is not None else None
        if ours is not None and decoder is not None:
            self._shared(ours, decoder.caps().vocab_size)

    def _shared(self, source: int, target: int) -> None:
        if self.id_map is None and source != target:
            raise ConfigError(f"SourceCopy needs a shared vocabulary (source {source}, target {target}); pass id_map")

    # ---- decoding
    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Take each row's source; without one it drafts nothing."""
        caps = model.caps()
        self._rows = {}
        for row, (prompt, source) in enumerate(zip(prompts, sources or [[] for _ in prompts])):
            if self.codes is not None and source and source[0] == caps.pad_id and len(source) > 1:
                raise DataError(f"source {row} begins with padding (id {caps.pad_id}): pass source_mask with it")
            if self.id_map is not None:
                source = [self.id_map.get(i, NOWHERE) for i in source]
            elif source and max(source) >= caps.vocab_size:
                self._shared(max(source) + 1, caps.vocab_size)
            if source and source[-1] in caps.eos_ids:
                source = source[:-1]  # the end is the model's to say
            self._rows[row] = Alignment(source, self.max_gram, len(prompt))

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """The source from where the output has got to; None where that can't be told."""
        at = self._rows[row]
        emitted = context[at.start :]
        found = at.places(emitted)
        if len(found) > 1 and self.multiple != "unique":
            expected = at.expected(len(emitted))
            found = sorted(found, key=lambda place: abs(place - expected))[: 1 if self.multiple == "nearest" else None]
        elif len(found) != 1:
            found = [at.expected(len(emitted))] if self.resume else []
        found = [place for place in found if 0 <= place < len(at.source)]
        if not found:
            return None
        most = min(n for n in (budget, self.max_draft, at.reach if self.adapt else None) if n is not None)
        at.anchor = (found[0], len(emitted))
        chains = [at.copied(place, most) for place in found]
        return Draft.chain(chains[0]) if len(chains) == 1 and chains[0] else merged(chains, most)

    def observe(self, row: int, context: list[int], accepted: list[int], rejected: list[int]) -> None:
        """Note how far the draft was right."""
        if self.adapt and (len(accepted) > 1 or rejected):
            self._rows[row].note(len(accepted) - 1, bool(rejected))


class Alignment:
    """One row's source, where its runs of tokens end, and where the output stands in it.

    Args:
        source: Ids; -1 is never copied.
        max_gram: Longest run indexed.
        start: Tokens of the prompt.

    Attributes:
        anchor: A place in the source, and the number of emitted tokens for which it was next.
        reach: Tokens that the next draft may have.
    """

    def __init__(self, source: list[int], max_gram: int, start: int) -> None:
        self.source, self.max_gram, self.start = source, max_gram, start
        self.anchor: tuple[int, int] = (0, 0)
        self.reach = 2 * EIGHT - 1
        self._stood, self._ended = 27.0, 3.0  # as if three edits, one in ten tokens, had been seen
        self._ends: dict[tuple[int, ...], list[int]] | None = None

    def places(self, emitted: Sequence[int]) -> list[int]:
        """Places that may come next: one, several, or none. The start of the output is the start of the source."""
        if not self.source:
            return []
        if not emitted:
            return [0]
        if len(emitted) == 1 and emitted[0] == self.source[0]:  # the paper's first draft, whose first token stood
            return [1]
        return self.rematch(emitted)

    def rematch(self, emitted: Sequence[int]) -> list[int]:
        """Where the last tokens stand in the source: the shortest run with one place, else all of the longest's."""
        ends = self._index()
        found: list[int] = []
        for size in range(1, min(self.max_gram, len(emitted)) + 1):
            longer = ends.get(tuple(emitted[-size:]))
            if longer is None:
                break
            found = longer
            if len(found) == 1:
                break
        return found

    def expected(self, emitted: int) -> int:
        """Where copying would have got to, were every edit a replacement."""
        place, count = self.anchor
        return place + emitted - count

    def copied(self, place: int, most: int) -> list[int]:
        """Ids from a place on."""
        ids = self.source[place : place + most]
        return ids[: ids.index(NOWHERE)] if NOWHERE in ids else ids

    def note(self, stood: int, ended: bool) -> None:
        """A draft stood for so many tokens, and ``ended`` before its own end."""
        self._stood = FADE * self._stood + stood
        self._ended = FADE * self._ended + ended
        slots = 1.8 * self._stood / self._ended + 2  # at evenly spread edits 5 in 6 stretches are shorter
        self.reach = EIGHT * max(1, round(slots / EIGHT)) - 1  # with the pending token whole eights, as kernels like

    def _index(self) -> dict[tuple[int, ...], list[int]]:
        if self._ends is None:
            self._ends = {}
            for size in range(1, self.max_gram + 1):
                for end in range(size, len(self.source) + 1):
                    self._ends.setdefault(tuple(self.source[end - size : end]), []).append(end)
        return self._ends


def merged(chains: Sequence[Sequence[int]], most: int) -> Draft | None:
    """Several continuations as one tree of at most ``most`` nodes: a place in turn from each, equal starts once."""
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    ends = [-1] * len(chains)
    for depth in range(max(map(len, chains), default=0)):
        for i, chain in enumerate(chains):
            if depth < len(chain):
                key = (ends[i], chain[depth])
                if key not in known:
                    if len(tokens) == most:
                        return Draft(tokens, parents)
                    known[key] = len(tokens)
                    tokens.append(chain[depth])
                    parents.append(ends[i])
                ends[i] = known[key]
    return Draft(tokens, parents) if tokens else None


def _as_map(given: Mapping[int, int] | Sequence[int]) -> dict[int, int]:
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    return {int(a): int(b) for a, b in pairs}
