"""MultiTaskDecoder: one light decoder a task, each asking the visible tokens by cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.roles.tokens.blocks import make_blocks, run, xavier
from quire.roles.tokens.contract import CellDecoder, Layout, Segment, Subset, Tokens
from quire_multimae.adapters import ModalityAdapter, tiny_run
from quire_multimae.encoder import SharedPlaces
from quire_multimae.outputs import Tasks, outputs


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another.

    Args:
        width: Of both.
        heads: They divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.proj = xavier(nn.Linear(width, width)), xavier(nn.Linear(width, width))
        self.kv = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.kv.bias)
        for matrix in self.kv.weight.chunk(2):
            nn.init.xavier_uniform_(matrix)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,n,d] and [B,M,d], ``mask`` [B,M] True = real → [B,n,d]."""
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask[:, None, None, :]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2))


class TaskDecoder(nn.Module):
    """The decoder of one task.

    Args:
        inlet: Width of the encoder's tokens.
        names: Modalities of the encoder, in order.
        own: Name of the modality that is predicted.
        values: Numbers or logits for each cell.
        width, heads, depth: Of its own trunk.
        asks: Whether a query holds what was seen in its cell, and the modality's embedding.
    """

    def __init__(
        self, inlet: int, names: list[str], own: str, values: int, width: int, heads: int, depth: int, asks: bool
    ) -> None:
        super().__init__()
        self.names, self.own, self.asks = names, own, asks
        self.inlet = xavier(nn.Linear(inlet, width))
        self.empty = nn.Parameter(torch.zeros(width))
        kinds = [nn.init.trunc_normal_(torch.empty(width), std=0.02) for _ in names]
        self.kinds = nn.ParameterList([nn.Parameter(k) for k in kinds])  # vectors, so no weight decay
        self.norm_q, self.norm_c, self.norm_x = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.cross = CrossAttention(width, heads)
        self.mlp = nn.Sequential(xavier(nn.Linear(width, 4 * width)), nn.GELU(), xavier(nn.Linear(4 * width, width)))
        self.blocks = make_blocks(width, depth, heads)
        self.head = xavier(nn.Linear(width, values))

    def forward(self, codes: Tokens, segment: Segment, places: Tensor, own_places: Tensor) -> Tensor:
        """Predict every cell of ``segment``.

        Args:
            codes: What the encoder saw.
            segment: Grid of the output; its ``start`` counts where the codes have that modality.
            places: [N,d] of the codes' layout.
            own_places: [n,d] of ``segment``.

        Returns:
            [B,n,values].
        """
        seen = self.inlet(codes.values)
        kind = {s.name: self.kinds[self.names.index(s.name)] for s in codes.layout.segments}
        marks = torch.cat([kind[s.name].expand(s.cells, -1) for s in codes.layout.segments]) + places
        context = torch.cat([seen + marks.to(seen.dtype)[codes.index], self.inlet(codes.prefix)], 1)
        queries = self._queries(codes, segment, seen) + own_places.to(seen.dtype)
        if self.own in self.names:
            queries = queries + self.kinds[self.names.index(self.own)]
        mask = F.pad(codes.mask, (0, codes.prefix.shape[1]), value=True) if codes.padded else None
        x = self.cross(self.norm_q(queries), self.norm_c(context), mask)  # no residual around it
        x = x + self.mlp(self.norm_x(x))
        return self.head(run(self.blocks, x))

    def _queries(self, codes: Tokens, segment: Segment, seen: Tensor) -> Tensor:
        rows, cells = len(seen), segment.cells
        empty = self.empty.to(seen.dtype).expand(rows, cells + 1, -1)
        if not self.asks or segment.name not in {s.name for s in codes.layout.segments}:
            return empty[:, :cells]
        place = codes.index - segment.start
        place = torch.where((place >= 0) & (place < cells) & codes.mask, place, cells)  # all others into a spare row
        return empty.scatter(1, place[..., None].expand_as(seen), seen)[:, :cells]


class MultiTaskDecoder(CellDecoder):
    """Tokens → a prediction of every cell for every task, each by its own decoder. Bachmann et al. 2022.

    A decoder's queries are its own modality's cells; cross-attention, without a residual, reads the visible tokens of
    all modalities; then come a few blocks and one linear map to the values of a patch, channel first.

    Args:
        tasks: Task → the modality of the encoder that it predicts, or an adapter that describes an output that
            isn't an input; null is one task a modality.
        width: d, of every decoder.
        heads: Attention heads; they divide the width.
        depth: Blocks after the cross-attention.
        task_queries: Whether the query of a visible cell holds what was seen there; otherwise all are mask tokens.

    Returns:
        Predictions by task, [B,N_task,values]: numbers, or logits [classes*ph*pw].

    Raises:
        ConfigError: no task, one on a modality that the encoder lacks, or heads that don't divide the width.
    """

    def __init__(
        self,
        tasks: dict[str, str | ModalityAdapter] | None = None,
        width: int = 256,
        heads: int = 8,
        depth: int = 2,
        task_queries: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"MultiTaskDecoder has width={width}, not divisible by heads={heads}")
        if tasks is not None and not tasks:
            raise ConfigError("MultiTaskDecoder.tasks is empty: name a task, or leave it out for one a modality")
        self.tasks: Tasks | None = tasks
        self.width, self.heads, self.depth, self.task_queries = width, heads, depth, task_queries
        self.outputs: dict[str, ModalityAdapter] = {}
        self.grids: dict[str, Segment] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits, their edges and their levels."""
        return tiny_run()

    def build(self, spec: Spec) -> None:
        """Make a decoder for each task."""
        super().build(spec)
        found = outputs(self.tasks, spec, self)
        self.outputs = found
        home = Layout.read(spec.code("segments", self))
        names = [s.name for s in home.segments]
        width = int(spec.code("width", self))
        own = {a.name: a.segment(spec) for a in found.values() if a.name not in names}
        layout = Layout.of(*home.segments, *own.values())
        self.grids = {s.name: s for s in layout.segments}
        maps = {a.name for a in found.values() if a.classes}
        self.places = SharedPlaces(layout, self.width, {n for n in self.grids if n not in maps})
        self.decoders = nn.ModuleDict(
            {
                task: TaskDecoder(width, names, a.name, a.values, self.width, self.heads, self.depth, self.task_queries)
                for task, a in found.items()
            }
        )

    def segment(self, task: str, layout: Layout) -> Segment:
        """Grid of a task's output: the codes' own where they have that modality, else what it was built for."""
        name = self.outputs[task].name
        return next((s for s in layout.segments if s.name == name), self.grids[name])

    def forward(
        self, codes: Tokens, subset: Subset | None = None, mask: Tensor | None = None, only: list[str] | None = None
    ) -> dict[str, Tensor]:
        """Predict every cell of every task.

        Args:
            codes: The encoder's tokens; ``index`` says which cells they are.
            subset: The draw that kept them; not needed.
            mask: Not needed: the codes know their padding.
            only: Tasks to predict; all when None.
        """
        places = self.places(codes.layout)
        made = {}
        for task, decoder in self.decoders.items():
            if only is not None and task not in only:
                continue
            segment = self.segment(task, codes.layout)
            own = self.places(Layout((segment,)))
            if self.outputs[task].classes and codes.values.dtype != torch.float64:  # logits overflow in fp16
                with torch.autocast(codes.values.device.type, enabled=False):
                    whole = codes.with_values(codes.values.float(), codes.prefix.float())
                    made[task] = decoder(whole, segment, places, own)
            else:
                made[task] = decoder(codes, segment, places, own)
        return made
