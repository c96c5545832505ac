"""What every TokenEncoder must keep: places, no leak, order, context, positions, padding, grids, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Spec, build, plain
from quire.errors import ConfigError, QuireError
from quire.recipe import instantiate
from quire.roles.masking import Masking
from quire.roles.tokens.contract import Segment, Subset, TokenEncoder, gather
from quire.testing.bench import ROWS, Bench, agree, bench, far, first_rows, masked_by
from quire.testing.cells import changed, shuffled
from quire.testing.quiet import quietly
from quire.testing.subject import Subject
from quire.testing.trial import needed
from quire.testing.verdict import Fault, Skip


@torch.no_grad()
def token_layout(subject: Subject) -> None:
    """Tokens, index, prefix and sizes agree with the layout; a cell's data is in that cell's token."""
    it = bench(subject)
    tokens, layout, said = it.embed(), it.encoder.layout(it.batch), it.encoder.sizes()
    rows, cells, prefix = len(tokens.values), layout.cells, it.encoder.prefix_tokens
    shape, wanted = list(tokens.values.shape), [rows, cells, it.encoder.width]
    if shape != wanted:
        raise Fault(f"{it.name}.embed gives {shape}; batch, layout and width say {wanted}")
    if not torch.equal(tokens.index, torch.arange(cells).expand(rows, cells)):
        raise Fault(f"{it.name}.embed must index its tokens 0..{cells - 1}: prefix tokens have no index")
    for given in (tokens.prefix.shape[1], it.encoded().prefix.shape[1], said.get("prefix_tokens")):
        if given != prefix:
            raise Fault(f"{it.name} has prefix_tokens={prefix}, but embed, forward or sizes() say {given}")
    if said.get("cells") != cells:
        raise Fault(f"{it.name}.sizes() says {said.get('cells')} cells, its layout {cells}")
    for segment in layout.segments:
        for cell in sorted({0, segment.cells // 2, segment.cells - 1}):
            _in_its_place(it.name, it.encoder, it.batch, segment, cell)


def _in_its_place(name: str, encoder: Any, batch: Batch, segment: Segment, cell: int) -> None:
    before, after = encoder.embed(dict(batch)).values, encoder.embed(changed(batch, segment, cell)).values
    moved, wanted = int((before - after).abs().sum((0, 2)).argmax()), segment.start + cell
    if moved != wanted:
        raise Fault(f"{name}: other data in cell {cell} of {segment.name} changes token {moved}, not {wanted}")


@torch.no_grad()
def token_leak(subject: Subject) -> None:
    """Dropped tokens are not seen: whatever they hold, the kept tokens come out bit-equal."""
    it = bench(subject)
    it.needs("subset")
    tokens = it.embed()
    chosen = it.subset(*tokens.values.shape[:2])
    other = torch.where(chosen.kept()[..., None], tokens.values, it.noise(tokens.values))
    a, b = it.encoder.encode(tokens, keep=chosen), it.encoder.encode(tokens.with_values(other), keep=chosen)
    if not torch.equal(a.joined(), b.joined()):
        raise Fault(f"{it.name} leaks: the kept tokens change when only dropped tokens do")
    if not torch.equal(a.index, chosen.keep):
        raise Fault(f"{it.name}.encode with keep must return the kept tokens' index")


@torch.no_grad()
def token_keep_all(subject: Subject) -> None:
    """Keeping all tokens is the same as no ``keep``; embedding the kept ones only is the same as all."""
    it = bench(subject)
    it.needs("subset")
    tokens = it.embed()
    rows, cells = tokens.values.shape[:2]
    everything = torch.arange(cells).expand(rows, cells)
    a, b = it.encoder.encode(tokens), it.encoder.encode(tokens, keep=everything)
    agree(a.values, b.values, 1e-6, f"{it.name}: keep=all differs from no keep")
    chosen = it.subset(rows, cells)
    a, b = it.encoder.encode(tokens, keep=chosen), it.encoded(keep=chosen)
    agree(a.values, b.values, 1e-6, f"{it.name}: forward with keep differs from embed, then encode with keep")


@torch.no_grad()
def token_order(subject: Subject) -> None:
    """Permuting ``keep`` permutes the outputs."""
    it = bench(subject)
    it.needs("subset")
    tokens = it.embed()
    rows, cells = tokens.values.shape[:2]
    keep = it.subset(rows, cells, 0.75).keep
    order = torch.randperm(keep.shape[1], generator=it.generator)
    a, b = it.encoder.encode(tokens, keep=keep), it.encoder.encode(tokens, keep=keep[:, order])
    agree(a.values[:, order], b.values, 1e-5, f"{it.name}: permuting keep does not permute the outputs")
    if not torch.equal(b.index, keep[:, order]):
        raise Fault(f"{it.name}.encode must return the index in the order of keep")


@torch.no_grad()
def token_context(subject: Subject) -> None:
    """``context`` is attention with masked columns: all are queries, only the context is seen, in every layer."""
    it = bench(subject)
    it.needs("context")
    tokens = it.embed()
    rows, cells = tokens.values.shape[:2]
    chosen = it.subset(rows, cells)
    found, masked = it.encoder.encode(tokens, context=chosen), it.encoder.encode(masked_by(tokens, chosen.kept()))
    if found.values.shape[1] != cells:
        raise Fault(f"{it.name} with context gives {found.values.shape[1]} of {cells} tokens: all of them are queries")
    seen = chosen.kept() | masked.values.any(-1)  # an encoder may return 0 for padding
    agree(found.values[seen], masked.values[seen], 1e-5, f"{it.name}: context differs from masked columns")
    values = tokens.values.clone()
    values[:, 0] += 1
    outside = chosen.restore[:, 0] >= chosen.keep.shape[1]  # rows where token 0 is not in the context
    other = it.encoder.encode(tokens.with_values(values), context=chosen).values
    agree(
        found.values[outside, 1:], other[outside, 1:], 1e-6, f"{it.name}: others see a token that isn't in the context"
    )
    if "subset" in it.encoder.capabilities:
        _context_and_keep(it, chosen, found.values)


def _context_and_keep(it: Bench, chosen: Subset, found: Tensor) -> None:
    tokens = it.embed()
    alone = it.encoder.encode(tokens, keep=chosen).values
    agree(gather(found, chosen.keep), alone, 1e-5, f"{it.name}: context tokens see tokens outside the context")
    inner = it.subset(*chosen.keep.shape)
    both = it.encoder.encode(tokens, keep=chosen, context=inner).values
    wanted = it.encoder.encode(tokens.take(chosen.keep), context=inner).values
    agree(both, wanted, 1e-5, f"{it.name}: with keep, context must count among the kept tokens")


@torch.no_grad()
def token_positions(subject: Subject) -> None:
    """Without positions, moving cells moves tokens and changes nothing else; with positions it must change them."""
    it = bench(subject)
    layout = it.encoder.layout(it.batch)
    segment = layout.segments[0]
    if segment.cells < 2:
        raise Skip("one cell has no order")
    order = torch.randperm(segment.cells, generator=it.generator)
    whole = torch.arange(layout.cells)
    whole[segment.start : segment.stop] = segment.start + order
    difference = far(it.encoded().values[:, whole], it.encoded(shuffled(it.batch, segment, order)).values)
    kind = it.encoder.positions
    if kind == "none" and difference > 1e-5:
        raise Fault(f"{it.name} has positions none, but moving cells changes its outputs by {difference:.1e}")
    if kind != "none" and difference < 1e-3:
        raise Fault(f"{it.name} has positions {kind}, but moving cells changes its outputs by only {difference:.1e}")


@torch.no_grad()
def token_padding(subject: Subject) -> None:
    """Padding is out of keys: neither its contents nor its length change a real token."""
    it = bench(subject)
    tokens = it.embed()
    rows, cells = tokens.values.shape[:2]
    real = max(1, cells - max(1, cells // 3))
    mask = (torch.arange(cells) < real).expand(rows, cells)
    garbage = torch.where(mask[..., None], tokens.values, 3 * it.noise(tokens.values))
    padded = masked_by(tokens, mask)
    a = it.encoder.encode(padded).values[:, :real]
    b = it.encoder.encode(padded.with_values(garbage)).values[:, :real]
    agree(a, b, 1e-5, f"{it.name}: what padding holds changes real tokens; mask the keys")
    short = it.encoder.encode(tokens.take(torch.arange(real).expand(rows, real))).values
    agree(a, short, 1e-5, f"{it.name}: longer padding changes real tokens")
    _padded_batch(it)


def _padded_batch(it: Bench) -> None:
    segment = it.encoder.layout(it.batch).segments[0]
    mask = "source_mask" if segment.field == "source" else "mask"
    if mask not in it.batch or len(segment.grid) != 1 or segment.grid[0] < 2:
        return
    real, total = segment.grid[0] // 2, it.batch[segment.field].shape[1]
    length = real * segment.patch[0]
    longer = {**it.batch, mask: (torch.arange(total) < length).expand(it.batch[mask].shape)}
    for cell in range(real, segment.grid[0]):
        longer = changed(longer, segment, cell)
    lengths = {k: v.shape[1] for k, v in it.batch.items() if isinstance(v, Tensor) and v.ndim > 1}
    shorter = {k: v[:, :length] if lengths.get(k) == total else v for k, v in it.batch.items()}
    try:
        a = it.encoded(shorter).values
    except ConfigError:  # it takes one length only
        return
    agree(a, it.encoded(longer).values[:, :real], 1e-5, f"{it.name}: a batch with longer padding changes real tokens")


@torch.no_grad()
def token_grid(subject: Subject) -> None:
    """A grid of 2 x 3 cells works, row by row, where the cells are cut from images."""
    it = bench(subject)
    segments = it.encoder.layout(it.batch).segments
    if len(segments) != 1 or len(segments[0].grid) != 2 or segments[0].field != "image":
        raise Skip("not one grid of image patches")
    height, width = (g * p for g, p in zip((2, 3), segments[0].patch))
    image = torch.rand(ROWS, it.batch["image"].shape[1], height, width, generator=it.generator)
    try:
        with quietly():
            fresh: Any = instantiate(plain(it.encoder))
            build(fresh, Spec({**it.encoder.__dict__["built_with"], "image_size": [height, width]}))
            tokens = fresh.eval()({"image": image})
    except (QuireError, RuntimeError, ValueError, AssertionError) as error:
        raise Fault(f"{it.name} can't encode images of {height}x{width}, 2 x 3 cells: {error}") from error
    if tokens.layout.grid != (2, 3) or tokens.values.shape[1] != 6:
        raise Fault(f"{it.name} has grid {tokens.layout.grid} and {tokens.values.shape[1]} tokens for 2 x 3 cells")
    for cell in range(6):
        _in_its_place(it.name, fresh, {"image": image}, tokens.layout.only(), cell)


def token_gradients(subject: Subject) -> None:
    """Gradients of the outputs reach the kept tokens and no other."""
    it = bench(subject)
    it.needs("subset")
    tokens = it.embed()
    values = tokens.values.detach().requires_grad_(True)
    chosen = it.subset(*values.shape[:2])
    out = it.encoder.encode(tokens.with_values(values), keep=chosen).values
    (out * it.noise(out)).sum().backward()
    assert values.grad is not None  # it is a leaf
    reached = values.grad.abs().sum(2) > 0
    if bool((reached & ~chosen.kept()).any()):
        raise Fault(f"{it.name}: gradients reach dropped tokens")
    if not bool(reached[chosen.kept()].all()):
        raise Fault(f"{it.name}: no gradient reaches some of the kept tokens")


@torch.no_grad()
def token_features(subject: Subject) -> None:
    """Features of layer 0 are the embedded tokens, the last layer's have their shape; logits span the vocabulary."""
    it = bench(subject)
    if not {"features", "lm_head"} & set(it.encoder.capabilities):
        raise Skip(f"{it.name} offers neither features nor lm_head")
    if "features" in it.encoder.capabilities:
        first, last = (it.encoder.features(dict(it.batch), layer).values for layer in (0, -1))
        agree(first, it.embed().values, 1e-6, f"{it.name}.features of layer 0 must be what embed gives")
        if last.shape != first.shape:
            raise Fault(f"{it.name}.features of layer -1 gives {list(last.shape)}, layer 0 {list(first.shape)}")
    if "lm_head" in it.encoder.capabilities:
        tokens = it.encoded()
        shape, wanted = list(it.encoder.logits(tokens).shape), it.encoder.sizes().get("vocab_size")
        if shape != [*tokens.values.shape[:2], wanted]:
            raise Fault(f"{it.name}.logits gives {shape}; it must be [B,T,V] with V={wanted} of sizes()['vocab_size']")


@torch.no_grad()
def token_alone(subject: Subject) -> None:
    """In eval mode a sample's tokens do not depend on the other samples of the batch."""
    it = bench(subject)
    together, alone = it.encoded().values[:1], it.encoded(first_rows(it.batch, 1)).values
    agree(together, alone, 1e-5, f"{it.name}: a sample's tokens change when it is encoded alone")


@torch.no_grad()
def token_bf16(subject: Subject) -> None:
    """Under bfloat16 autocast every token points the same way, to a cosine of 0.99."""
    it = bench(subject)
    full = it.encoded().values
    with torch.autocast("cpu", torch.bfloat16):
        half = it.encoded().values.float()
    cosine = float(torch.nn.functional.cosine_similarity(full, half, dim=-1).min())
    if not cosine >= 0.99:
        raise Fault(f"{it.name} in bfloat16 turns a token to a cosine of {cosine:.3f} with float32")


CHECKS = (
    token_layout,
    token_leak,
    token_keep_all,
    token_order,
    token_context,
    token_positions,
    token_padding,
    token_grid,
    token_gradients,
    token_features,
    token_alone,
    token_bf16,
)


def masking_draws(subject: Subject) -> None:
    """A masking draws from its generator alone: the same subset again, keep and rest disjoint and complete."""
    made = needed(lambda: subject.trial.made(), "constructs")
    part, encoder = made.find(subject.cls), made.model.find(TokenEncoder)
    if not isinstance(part, Masking) or encoder is None:
        raise Skip("no Masking beside a TokenEncoder in its tiny run")
    layout = encoder.built_layout
    draws = []
    for noise in range(2):
        torch.manual_seed(noise)
        draws.append(part.draw(layout, 16, None, torch.Generator().manual_seed(3)))
    first, second = draws
    if not torch.equal(first.keep, second.keep):
        raise Fault(f"{subject.name} draws another subset from the same generator: use no other randomness")
    cells = torch.arange(layout.cells).expand(16, -1)
    if not torch.equal(torch.cat([first.keep, first.rest], 1).sort(1).values, cells):
        raise Fault(f"{subject.name}: keep and rest must hold every cell once")
    if not torch.equal(first.unshuffle(first.shuffle(cells)), cells):
        raise Fault(f"{subject.name}: restore must undo the shuffle")


MASKING = (masking_draws,)
