"""Counts and times that every decoding result carries."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Stats:
    """What one batch cost. Milliseconds of wall time; ``merge`` adds batches.

    Attributes:
        prefill_ms, decode_ms, draft_ms, verify_ms: Time in prompt, loop, drafters, target passes.
        ttft_ms: Time to the first token of the first row.
        prefills: Passes of the target model over prompts; target_forwards: its passes after them; ``passes`` is both.
        target_positions: Slots that those passes computed, and guesses that the prefill checked.
        drafter_forwards: Passes of models inside drafters.
        drafted: Nodes proposed; accepted: nodes that stood (the bonus token is not counted).
        accepted_hist: accepted per step → how often.
        depth_drafted, depth_accepted: Per depth of node (from 1), for ``per_depth_accept`` and ``per_step_accept``.
        fallback_steps: Steps without a draft; guard_off_steps: of these, those the guard chose.
        rows_looped: Rows run one by one because the model has no ``batch``.
        layers_used: Sum over steps of layers run; 0 when the model does not route.
        cache_bytes_peak: Bytes of the target's cache at its largest.
        new_tokens: Tokens emitted; rows: continuations; cut: accepted tokens past a stop.
        steps: Row-steps of the loop; opened: of these, those that the prefill checked along with the prompt.
    """

    prefill_ms: float = field(default=0.0, compare=False)
    decode_ms: float = field(default=0.0, compare=False)
    draft_ms: float = field(default=0.0, compare=False)
    verify_ms: float = field(default=0.0, compare=False)
    ttft_ms: float = field(default=0.0, compare=False)
    prefills: int = 0
    target_forwards: int = 0
    target_positions: int = 0
    drafter_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_hist: dict[int, int] = field(default_factory=dict)
    depth_drafted: dict[int, int] = field(default_factory=dict)
    depth_accepted: dict[int, int] = field(default_factory=dict)
    fallback_steps: int = 0
    guard_off_steps: int = 0
    rows_looped: int = 0
    layers_used: float = 0.0
    cache_bytes_peak: int = 0
    new_tokens: int = 0
    rows: int = 0
    steps: int = 0
    opened: int = 0
    cut: int = 0

    @property
    def passes(self) -> int:
        """Passes of the target model, those over prompts included."""
        return self.prefills + self.target_forwards

    @property
    def tpot_ms(self) -> float:
        """Decode time per token after each row's first."""
        return self.decode_ms / max(1, self.new_tokens - self.rows)

    @property
    def layers_used_mean(self) -> float:
        """Layers run per target pass; 0 when the model does not route."""
        return self.layers_used / max(1, self.target_forwards)

    def per_depth_accept(self) -> dict[int, float]:
        """Share of drafted nodes that stood, by depth."""
        return {d: self.depth_accepted.get(d, 0) / n for d, n in sorted(self.depth_drafted.items())}

    def per_step_accept(self) -> dict[int, float]:
        """Share of steps whose accepted path reached each depth; the sum is what a step accepts on average."""
        return {d: n / max(1, self.steps) for d, n in sorted(self.depth_accepted.items())}

    def count(self, drafted_depths: list[int], accepted: int) -> None:
        """Note one verified draft."""
        self.drafted += len(drafted_depths)
        self.accepted += accepted
        self.accepted_hist[accepted] = self.accepted_hist.get(accepted, 0) + 1
        for depth in drafted_depths:
            self.depth_drafted[depth] = self.depth_drafted.get(depth, 0) + 1
        for depth in range(1, accepted + 1):
            self.depth_accepted[depth] = self.depth_accepted.get(depth, 0) + 1

    def merge(self, other: Stats) -> Stats:
        """The sum of two; peaks are maxima, the time to first token is the first's."""
        made = Stats()
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(mine, dict):
                value: Any = {k: mine.get(k, 0) + theirs.get(k, 0) for k in sorted({*mine, *theirs})}
            elif name == "cache_bytes_peak":
                value = max(mine, theirs)
            elif name == "ttft_ms":
                value = mine or theirs
            else:
                value = mine + theirs
            setattr(made, name, value)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values, derived ones included."""
        return {
            **asdict(self),
            "tpot_ms": self.tpot_ms,
            "layers_used_mean": self.layers_used_mean,
            "per_depth_accept": self.per_depth_accept(),
            "per_step_accept": self.per_step_accept(),
        }

    def to_json(self) -> str:
        """One line; ``from_json`` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Stats:
        """What ``to_json`` wrote."""
        given = json.loads(text)
        own: dict[str, Any] = {f.name: given[f.name] for f in fields(cls) if f.name in given}
        for name, value in own.items():
            own[name] = {int(n): c for n, c in value.items()} if isinstance(value, dict) else value
        return cls(**own)

    def table(self) -> str:
        """One line a figure."""
        return "\n".join(f"{name:<18} {value}" for name, value in self.to_dict().items() if value)
