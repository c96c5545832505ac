"""What step models, drafters and acceptance rules must keep: places, caches, rows, padding, and losslessness."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.roles.language.accept import Exact
from quire.roles.language.contract import Acceptance, Draft, Drafter
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Speculative
from quire.roles.language.proof import assert_lossless
from quire.testing.bench import agree
from quire.testing.subject import Subject
from quire.testing.talk import LENGTHS, Talk, adversary, opened, talk
from quire.testing.verdict import Fault, Skip

CLOSE = 1e-4
PARENTS = [-1, -1, 0, 2, 0]  # a tree of five slots: 0 → 2 → 3, a sibling of 0 and one of 2
DRAWS = 1500
COUNT = 8


# ---- step models
@torch.no_grad()
def step_caps(subject: Subject) -> None:
    """Logits are fp32 and as wide as the vocabulary; lengths count real tokens; special ids are in the vocabulary."""
    it = talk(subject)
    caps, prompts = it.target.caps(), _prompts(it)
    state = opened(it, prompts)
    logits = it.target.step(state, it.ids(len(prompts), 1))
    for found, wanted in (
        (state.logits, [len(prompts), caps.vocab_size]),
        (logits, [len(prompts), 1, caps.vocab_size]),
    ):
        if list(found.shape) != wanted or found.dtype != torch.float32:
            raise Fault(
                f"{it.name} gives logits {list(found.shape)} {found.dtype}; batch and caps say {wanted} float32"
            )
    outside = [i for i in (*caps.eos_ids, caps.pad_id, caps.start_id) if i is not None and not 0 <= i < caps.vocab_size]
    if outside:
        raise Fault(f"{it.name}.caps() has the special id {outside[0]} outside its vocabulary of {caps.vocab_size}")
    it.target.keep(state, torch.zeros(len(prompts), 1, dtype=torch.long))
    wanted = [len(p) + 1 for p in prompts]
    if state.lengths.tolist() != wanted:
        raise Fault(f"{it.name}: after one kept token lengths are {state.lengths.tolist()}, not {wanted}")


@torch.no_grad()
def step_positions(subject: Subject) -> None:
    """Steps of one and of several tokens behind a prompt give the logits of one whole pass: no position is off."""
    it = talk(subject)
    ids = it.ids(1, 10)
    one = _rows(it, [0])
    whole = it.target(one, ids, None).float()
    state = it.target.open(ids[:, :4], None, one, max_length=24)
    parts = [state.logits[:, None]]
    for start, width in ((4, 1), (5, 3), (8, 2)):
        parts.append(it.target.step(state, ids[:, start : start + width]))
        it.target.keep(state, torch.arange(width)[None])
    agree(torch.cat(parts, 1), whole[:, 3:], CLOSE, f"{it.name}: steps differ from one whole pass: look at positions")


@torch.no_grad()
def step_keep(subject: Subject) -> None:
    """Keeping a path of a tree, or nothing, leaves the state that a fresh ``open`` on the same ids gives."""
    it = talk(subject)
    caps, one = it.target.caps(), _rows(it, [0])
    prompt, draft, last = it.ids(1, 5), it.ids(1, 5, 1), it.ids(1, 1, 2)
    tree = caps.tree_mask and caps.gather
    for path in ([0, 2, 3], [1], []) if tree else ([0, 1, 2], [0], []):
        state = it.target.open(prompt, None, one, max_length=24)
        it.target.step(state, draft, parents=torch.tensor([PARENTS]) if tree else None)
        it.target.keep(state, torch.tensor([path + [-1] * (5 - len(path))]))
        after = it.target.step(state, last)[:, 0]
        fresh = it.target.open(torch.cat([prompt, draft[:, path], last], 1), None, one, max_length=24).logits
        agree(
            after, fresh, CLOSE, f"{it.name}: after keep of slots {path} it differs from a fresh open on the same ids"
        )


@torch.no_grad()
def step_tree(subject: Subject) -> None:
    """A slot of a tree sees the prompt and its own ancestors only."""
    it = talk(subject)
    if not it.target.caps().tree_mask:
        raise Skip(f"{it.name} takes no trees")
    prompt, draft, one = it.ids(1, 5), it.ids(1, 5, 1), _rows(it, [0])
    logits = it.target.step(it.target.open(prompt, None, one, max_length=24), draft, parents=torch.tensor([PARENTS]))
    for slot, path in enumerate(([0], [1], [0, 2], [0, 2, 3], [0, 4])):
        fresh = it.target.open(torch.cat([prompt, draft[:, path]], 1), None, one, max_length=24).logits
        agree(logits[:, slot], fresh, CLOSE, f"{it.name}: slot {slot} of a tree sees more or less than its ancestors")


@torch.no_grad()
def step_rows(subject: Subject) -> None:
    """``rows`` takes everything along: selected, repeated and permuted rows go on as they were."""
    it = talk(subject)
    prompts = _prompts(it)
    next_ids = it.ids(len(prompts), 2, 9)
    for order in ([2, 0, 0, 3], [3, 1]):
        place = torch.tensor(order)
        plain, moved = opened(it, prompts), opened(it, prompts)
        wanted = it.target.step(plain, next_ids)[place]
        it.target.rows(moved, place)
        agree(moved.logits, plain.logits[place], 0, f"{it.name}.rows({order}) leaves the state's logits behind")
        found = it.target.step(moved, next_ids[place])
        agree(found, wanted, CLOSE, f"{it.name}.rows({order}) leaves a stale cache row: its logits are another row's")
        if moved.lengths.tolist() != plain.lengths[place].tolist():
            raise Fault(f"{it.name}.rows({order}) leaves lengths {moved.lengths.tolist()} behind")


@torch.no_grad()
def step_alone(subject: Subject) -> None:
    """A row of a batch gives what it gives alone, whatever side the prompts are padded on."""
    it = talk(subject)
    prompts = _prompts(it)
    next_ids = it.ids(len(prompts), 2, 9)
    for side in ("right", "left"):
        state = opened(it, prompts, side)
        first, then = state.logits, it.target.step(state, next_ids)
        for i, prompt in enumerate(prompts):
            alone = opened(it, [prompt], rows=[i])
            said = f"{it.name}: row {i} of a batch padded on the {side} differs from the same prompt alone"
            agree(first[i : i + 1], alone.logits, CLOSE, said)
            agree(then[i : i + 1], it.target.step(alone, next_ids[i : i + 1]), CLOSE, said)


@torch.no_grad()
def step_valid(subject: Subject) -> None:
    """Slots that are not valid are seen by nobody and are gone after ``keep``."""
    it = talk(subject)
    if not it.target.caps().batch:
        raise Skip(f"{it.name} takes no ragged batches")
    prompts = _prompts(it)
    ids, other = it.ids(len(prompts), 3, 9), it.ids(len(prompts), 3, 10)
    valid = torch.tensor([[True, True, i % 2 == 0] for i in range(len(prompts))])
    chosen = torch.tensor([[0, 1, 2 if i % 2 == 0 else -1] for i in range(len(prompts))])
    found = []
    for given in (ids, torch.where(valid, ids, other)):
        state = opened(it, prompts)
        logits = it.target.step(state, given, valid=valid)
        it.target.keep(state, chosen)
        found.append((logits[valid], it.target.step(state, it.ids(len(prompts), 1, 11))))
    for a, b in zip(*found):
        agree(a, b, CLOSE, f"{it.name}: what a slot that is not valid holds changes other logits")
    plain = opened(it, [prompts[1]], rows=[1])
    wanted = it.target.step(plain, torch.cat([ids[1:2, :2], it.ids(len(prompts), 1, 11)[1:2]], 1))[:, -1]
    agree(found[0][1][1:2, 0], wanted, CLOSE, f"{it.name}: a slot that is not valid is still there after keep")


@torch.no_grad()
def step_drafted(subject: Subject) -> None:
    """A prefill with guesses gives what ``open`` and ``step`` give; ``cut`` forgets those that don't stand."""
    it = talk(subject)
    prompts = _prompts(it)
    draft, last = it.ids(len(prompts), 3, 9), it.ids(len(prompts), 1, 10)
    for side in ("right", "left"):
        state = opened(it, prompts, side, draft=draft)
        if state is None:
            raise Skip(f"{it.name} checks no guesses in the prefill")
        plain = opened(it, prompts, side)
        wanted = torch.cat([plain.logits[:, None], it.target.step(plain, draft)], 1)
        agree(state.logits, wanted, CLOSE, f"{it.name}.open_drafted differs from open and a step behind it")
        kept = torch.tensor([i % 4 for i in range(len(prompts))])
        it.target.keep(plain, torch.arange(3).where(torch.arange(3) < kept[:, None], torch.tensor(-1)))
        it.target.cut(state, torch.tensor([len(p) for p in prompts]) + kept)
        if state.lengths.tolist() != plain.lengths.tolist():
            raise Fault(f"{it.name}: after open_drafted and cut lengths are {state.lengths.tolist()}")
        after = it.target.step(state, last)
        agree(after, it.target.step(plain, last), CLOSE, f"{it.name}: cut leaves guesses of open_drafted behind")


@torch.no_grad()
def step_embeds(subject: Subject) -> None:
    """``step`` with ``embed(ids)`` gives what it gives with the ids."""
    it = talk(subject)
    if not it.target.caps().embeds:
        raise Skip(f"{it.name} takes no embeddings")
    prompts, next_ids = _prompts(it), it.ids(len(LENGTHS), 2, 9)
    by_id = it.target.step(opened(it, prompts), next_ids)
    by_embedding = it.target.step(opened(it, prompts), None, embeds=it.target.embed(next_ids))
    agree(by_embedding, by_id, CLOSE, f"{it.name}: step with embeds=embed(ids) differs from step with ids")


def step_lossless(subject: Subject) -> None:
    """Prompt lookup and adversarial drafts change no id of greedy decoding."""
    it = talk(subject)
    prompts = it.prompts()
    for drafter in (PromptCopy(), adversary(it, prompts, COUNT, 0), adversary(it, prompts, COUNT, 1)):
        prove(it, drafter, prompts, COUNT)


# ---- drafters
def drafter_context(subject: Subject) -> None:
    """It leaves the prompts and the context as they are; drafts are trees of known ids within the budget."""
    it, drafter = _drafter(subject)
    caps, prompts = it.target.caps(), it.prompts((12, 5, 9, 7))
    for prompt in prompts:
        prompt += prompt[:3]  # something to find
    given = copy.deepcopy(prompts)
    _begin(it, drafter, given)
    if given != prompts:
        raise Fault(f"{it.name}.begin changes the prompts it is given: copy them")
    for row, prompt in enumerate(prompts):
        context = list(prompt)
        for budget in (1, 3, 16):
            draft = drafter.propose(row, context, budget)
            if context != prompt:
                raise Fault(f"{it.name}.propose changes the context it is given: copy it")
            if draft is not None:
                _tree(it.name, draft, budget, caps.vocab_size)
        accepted, rejected = it.ids(1, 2)[0].tolist(), it.ids(1, 1, 1)[0].tolist()
        kept = (list(accepted), list(rejected))
        drafter.observe(row, context, accepted, rejected)
        if context != prompt or (accepted, rejected) != kept:
            raise Fault(f"{it.name}.observe changes what it is given: copy it")


def drafter_lossless(subject: Subject) -> None:
    """With the exact rule its drafts change no id, in a batch and alone."""
    it, drafter = _drafter(subject)
    prompts = it.prompts((12, 5, 9, 1))
    prove(it, drafter, prompts, COUNT)
    if "source" not in it.batch:
        prove(it, drafter, prompts[:1], COUNT)


# ---- acceptance rules
def acceptance_paths(subject: Subject) -> None:
    """What it accepts is a path from the root, also of an empty tree, a single node and a tree with an end inside."""
    it, rule = _acceptance(subject)
    source = torch.Generator().manual_seed(0)
    drafts = [Draft([], []), Draft([2], [-1]), Draft([0, 1, 2, 0, 3], PARENTS), Draft([3, 3, 3], [-1, 0, 1])]
    for draft in drafts:
        for _ in range(50):
            logits = 2 * torch.randn(len(draft.tokens) + 1, 5, generator=source)
            nodes, bonus = rule.choose(logits, draft, source)
            above = [-1, *nodes[:-1]][: len(nodes)]
            if any(not 0 <= n < len(draft.tokens) for n in nodes) or [draft.parents[n] for n in nodes] != above:
                raise Fault(f"{it.name}.choose accepts {nodes} of parents {draft.parents}: not a path from the root")
            if not 0 <= bonus < 5:
                raise Fault(f"{it.name}.choose gives the bonus {bonus} of five tokens")


def acceptance_law(subject: Subject) -> None:
    """A rule that is declared lossless: each token it emits follows the law of plain decoding, ``first``."""
    it, rule = _acceptance(subject)
    if not rule.lossless:
        raise Skip(f"{it.name} declares lossless=False")
    draft = Draft([0, 1, 0, 2], [-1, -1, 0, 0])
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    emitted = torch.zeros(5, 5)  # behind which slot, which token
    source = torch.Generator().manual_seed(1)
    for _ in range(2 * DRAWS):
        nodes, bonus = rule.choose(logits.clone(), draft, source)
        for slot, token in zip([0, *(n + 1 for n in nodes)], [*(draft.tokens[n] for n in nodes), bonus]):
            emitted[slot, token] += 1
    for slot in range(5):
        if emitted[slot].sum() < 100:
            continue  # never or hardly ever reached
        plain = torch.zeros(5)
        for _ in range(DRAWS):
            plain[rule.first(logits[slot].clone(), source)] += 1
        p = same_law(emitted[slot], plain)
        if p < 1e-6:
            share = [[round(float(x), 2) for x in counts / counts.sum()] for counts in (emitted[slot], plain)]
            raise Fault(
                f"{it.name} declares lossless=True, but with a draft its tokens have the shares {share[0]}, without one"
                f" {share[1]} (p = {p:.0e}): take one sample a node and keep it"
            )


# ---- inside
def prove(it: Talk, drafter: Drafter, prompts: list[list[int]], count: int) -> None:
    """Raise ``Fault`` where decoding with the drafter differs from greedy decoding."""
    sampler = Speculative(drafter, Exact(), max_new_tokens=count, debug=True)
    try:
        assert_lossless(it.model, sampler, prompts, **it.fields(len(prompts)))
    except AssertionError as error:
        raise Fault(f"{it.name} with {type(drafter).__name__} is not lossless: {error}") from error


def same_law(a: Tensor, b: Tensor) -> float:
    """p-value that two rows of counts come from one law; 0 where a law that is one token gives another."""
    from scipy.stats import chi2_contingency

    seen = (a + b) > 0
    if int(seen.sum()) == 1:
        return 1.0
    return float(chi2_contingency(torch.stack([a[seen], b[seen]]).numpy()).pvalue)


def _prompts(it: Talk) -> list[list[int]]:
    return it.prompts() if it.target.caps().batch else it.prompts((4,) * len(LENGTHS))


def _rows(it: Talk, rows: list[int]) -> Any:
    from quire.roles.language.rows import select

    return None if it.codes is None else select(it.codes, rows, len(LENGTHS))


def _tree(name: str, draft: Draft, budget: int, vocab: int) -> None:
    if len(draft.tokens) != len(draft.parents) or any(not -1 <= p < i for i, p in enumerate(draft.parents)):
        raise Fault(f"{name} proposes parents {draft.parents}: each must come before its child, -1 is the root")
    if len(draft.tokens) > budget:
        raise Fault(f"{name} proposes {len(draft.tokens)} nodes with a budget of {budget}")
    if any(not 0 <= t < vocab for t in draft.tokens):
        raise Fault(f"{name} proposes ids outside the vocabulary of {vocab}: {draft.tokens}")


def _drafter(subject: Subject) -> tuple[Talk, Drafter]:
    it = talk(subject)
    drafter = subject.trial.spare().find(subject.cls)
    if not isinstance(drafter, Drafter):
        raise Skip("not reached: see registered")
    return it, drafter


def _begin(it: Talk, drafter: Drafter, prompts: list[list[int]]) -> None:
    drafter.refer("codes", it.codes)
    drafter.begin(it.target, prompts, None)


def _acceptance(subject: Subject) -> tuple[Talk, Acceptance]:
    it = talk(subject)
    rule = subject.trial.spare().find(subject.cls)
    if not isinstance(rule, Acceptance):
        raise Skip("not reached: see registered")
    return it, rule


STEP_MODEL: tuple[Callable[[Subject], None], ...] = (
    step_caps,
    step_positions,
    step_keep,
    step_tree,
    step_rows,
    step_alone,
    step_valid,
    step_drafted,
    step_embeds,
    step_lossless,
)
PARTS: dict[str, tuple[Callable[[Subject], None], ...]] = {
    "drafter": (drafter_context, drafter_lossless),
    "acceptance": (acceptance_paths, acceptance_law),
}
