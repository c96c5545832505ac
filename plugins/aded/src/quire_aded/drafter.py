"""Draft token trees from trigram weights that learn from what the model accepts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from quire.data import mix
from quire.errors import ConfigError
from quire.roles.language.accept import tiny_speculative
from quire.roles.language.contract import Draft, Drafter, StepModel
from quire.roles.language.guard import SpeedGuard
from quire_aded.corpus import trigrams_of_data, trigrams_of_path
from quire_aded.search import Search, trie
from quire_aded.store import Trigrams

if TYPE_CHECKING:
    from quire.model import Model

MOST = 64


class TrigramTree(Drafter):
    """Trees from a corpus' trigrams by PUCT search, adapted to what the model emits. Liu et al. 2024.

    No training: weights are counted, then each step strengthens the latest trigrams of prompt and continuation. Under
    ``Exact`` or ``SampleOnce`` any weights give the same output, only faster or slower.

    Args:
        corpus: ``data`` (the run's training tokens), a text file or folder, ``stdlib``, a ``.safetensors`` store of
            ``SaveTrigrams``, or null for none.
        nodes: Most nodes of a tree, 1 to 64; ``auto`` measures the model's passes and takes what pays.
        top_successors: Successors read of a row, the heaviest.
        window: Latest tokens whose trigrams are strengthened each step: window - 2 of them.
        delta: Strengthening, at least 0; for ``ema`` the rate, at most 1.
        cap: Upper bound of a weight.
        depth: Nodes of a searched path, the last known token included, at least 2.
        iterations: Descents of the search.
        c1: Exploration constant.
        c2: Exploration constant inside the logarithm.
        paths: Most visited prefixes taken.
        extend: Heaviest successors appended to each.
        width: 1 drafts a chain; null a tree where the model takes one, else a chain.
        update: ``additive`` (weights grow) or ``ema`` (a running mean).
        scope: ``run`` forgets at the end of each prediction run (outside a Trainer: of each call), ``shared`` never.
        seed: Of the search.
        max_rows: Most rows kept of the corpus and of what was observed, each.

    Raises:
        ConfigError: an argument out of range, a corpus that isn't there, or a store of another vocabulary.
    """

    def __init__(
        self,
        corpus: str | None = "data",
        nodes: int | str = 64,
        top_successors: int = 12,
        window: int = 16,
        delta: float = 0.04,
        cap: float = 3.0,
        depth: int = 4,
        iterations: int = 150,
        c1: float = 32.0,
        c2: float = 8.0,
        paths: int = 24,
        extend: int = 1,
        width: int | None = None,
        update: str = "additive",
        scope: str = "run",
        seed: int = 0,
        max_rows: int = 1_000_000,
    ) -> None:
        super().__init__()
        if nodes != "auto" and not (isinstance(nodes, int) and 1 <= nodes <= MOST):
            raise ConfigError(f"TrigramTree.nodes is 1 to {MOST} or auto, got {nodes!r}")
        for name, value, least in (
            ("depth", depth, 2),
            ("top_successors", top_successors, 1),
            ("window", window, 3),
            ("iterations", iterations, 1),
            ("paths", paths, 1),
            ("extend", extend, 0),
            ("max_rows", max_rows, 1),
            ("delta", delta, 0),
            ("c1", c1, 0),
        ):
            if value < least:
                raise ConfigError(f"TrigramTree.{name} must be at least {least}, got {value}")
        if cap <= 0 or c2 <= 0:
            raise ConfigError(f"TrigramTree needs cap and c2 above 0, got {cap} and {c2}")
        if width not in (None, 1):
            raise ConfigError(f"TrigramTree.width is 1 (a chain) or null (a tree), got {width!r}")
        if update not in ("additive", "ema") or scope not in ("run", "shared"):
            raise ConfigError(
                f"TrigramTree.update is additive or ema, scope run or shared; got {update!r} and {scope!r}"
            )
        if update == "ema" and delta > 1:
            raise ConfigError(f"TrigramTree.delta is a rate of at most 1 with update: ema, got {delta}")
        self.corpus, self.nodes, self.top, self.window = corpus, nodes, top_successors, window
        self.delta, self.cap, self.update, self.scope, self.width = delta, cap, update, scope, width
        self.depth, self.iterations, self.c1, self.c2 = depth, iterations, c1, c2
        self.paths, self.extend, self.seed, self.max_rows = paths, extend, seed, max_rows
        self.store: Trigrams | None = None
        self.guard = SpeedGuard() if nodes == "auto" else None
        self._model: Any = None
        self._chain = width == 1
        self._due: set[int] = set()
        self._budgets: dict[int, tuple[int, int, float]] = {}
        self._warned = False

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Trees from the training split of the standard library's documentation."""
        return tiny_speculative({}, {"class_path": "TrigramTree", "init_args": {"nodes": 8}})

    def bind(self, model: Model) -> None:
        """Keep the model: its data and tokenizer make the corpus."""
        super().bind(model)
        self.refer("_model", model)

    def callbacks(self) -> list[Callback]:
        """With ``scope: run``, what forgets between prediction runs."""
        from quire_aded.callbacks import ForgetTrigrams

        return [ForgetTrigrams()] if self.scope == "run" else []

    # ---- the store
    def learn(self, documents: Iterable[Sequence[int]], vocab_size: int, fingerprint: str = "") -> None:
        """Make the weights from documents of ids, in place of ``corpus``."""
        self.store = Trigrams.count(documents, vocab_size, fingerprint, self.max_rows)

    def forget(self) -> None:
        """Drop what was observed; the corpus stays."""
        if self.store is not None:
            self.store.forget()
        if self.guard is not None:
            self.guard.reset()

    def _opened(self, target: StepModel) -> Trigrams:
        vocab = target.caps().vocab_size
        said = self._model.spec.get("tokenizer") if self._model is not None and self._model.spec else None
        fingerprint = said if isinstance(said, str) else ""
        if self.store is None:
            if self.corpus is None:
                self.store = Trigrams(vocab, fingerprint, self.max_rows)
            elif self.corpus == "data":
                source = getattr(self._model, "datamodule", None)
                self.store = trigrams_of_data(source, vocab, fingerprint, self.max_rows)
            else:
                tokenizer = getattr(self._model, "tokenizer", None)
                self.store = trigrams_of_path(self.corpus, tokenizer, vocab, fingerprint, self.top, self.max_rows)
        self.store.need(vocab, fingerprint)
        return self.store

    # ---- decoding
    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Open the store; outside a Trainer each call is a run of its own."""
        self._opened(model)
        running = getattr(getattr(self._model, "_trainer", None), "predicting", False)
        if self.scope == "run" and not running:
            self.forget()
        self._due, self._budgets = set(), {}
        caps = model.caps()
        self._chain = self.width == 1 or not caps.tree_mask
        if self._chain and self.width is None and not self._warned:
            why = caps.lacks.get("tree_mask", "the model takes no tree mask")
            rank_zero_warn(f"TrigramTree drafts chains, not trees: {why}")
            self._warned = True
        if self.guard is not None:
            self.guard.calibrate(model)

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """Strengthen the latest trigrams, then search; None where the last bigram was never seen."""
        started = time.perf_counter()
        self._observe(context)
        self._due.add(row)
        most = min(budget, MOST)
        if self.guard is not None:
            most = self.guard.budget(most)
        elif isinstance(self.nodes, int):
            most = min(most, self.nodes)
        draft = self._search(context, most) if most > 0 and len(context) > 1 else None
        count = len(draft.tokens) if draft is not None else 0
        self._budgets[row] = (most, count, 1e3 * (time.perf_counter() - started))
        return draft

    def _search(self, context: list[int], most: int) -> Draft | None:
        assert self.store is not None, "begin opens the store"
        a, b = context[-2:]
        search = Search(self.store, self.depth, self.iterations, self.c1, self.c2, self.top)
        if not search.run(a, b, mix(self.seed, len(context), a, b)):
            return None
        if self._chain:
            return Draft.chain(search.best_chain(self.extend)[:most])
        return trie(search.paths(self.paths, self.extend), most)

    def observe(self, row: int, context: list[int], accepted: list[int], rejected: list[int]) -> None:
        """Learn on steps without a draft too: a guard that went plain must not stop the learning."""
        if row not in self._due:
            self._observe(context)
        elif self.guard is not None:
            allowed, count, spent = self._budgets[row]
            self.guard.note(allowed, count, len(accepted), spent)
        self._due.discard(row)

    def _observe(self, context: list[int]) -> None:
        assert self.store is not None, "begin opens the store"
        self.store.observe(context[-self.window :], self.delta, self.cap, self.update)
