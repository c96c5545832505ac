"""Training does what it should: gradients arrive, the loss falls, and the same seed gives the same bits."""

from __future__ import annotations

from quire.testing.saving import same
from quire.testing.subject import Subject, exemption
from quire.testing.trial import STEPS, needed
from quire.testing.verdict import Fault, Skip
from quire.testing.watch import FIRST, WINDOW, Watch


def learned(subject: Subject) -> Watch:
    """The training on one batch. Raises ``Skip`` when there is none."""
    ran = needed(lambda: subject.trial.ran(), "trains")
    if ran.made.model.objective is None:
        raise Skip("nothing to train: the tiny run has no objective")
    return subject.trial.learned()


def gradients(subject: Subject) -> None:
    """A finite gradient, not 0, reaches every trainable parameter of the model within a few steps."""
    watch = learned(subject)
    if watch.broken:
        raise Fault(f"the gradient of {next(iter(watch.broken))} is not finite")
    still = [n for n, moved in watch.moved.items() if not moved and not _excused(subject, n)]
    if still:
        more = f" (and {len(still) - 1} more)" if len(still) > 1 else ""
        raise Fault(
            f"no gradient reaches {still[0]}{more} in {WINDOW} steps: use it, drop it, or give the reason in exempt, "
            f"as {{'gradients:{still[0]}': '…'}}"
        )


def _excused(subject: Subject, parameter: str) -> bool:
    made = needed(lambda: subject.trial.made(), "constructs")
    classes = {type(c) for c in made.components()} | {subject.cls}
    return any(exemption(cls, "gradients", parameter) for cls in classes)


def learns(subject: Subject) -> None:
    """The loss falls on one batch: the mean of the last steps is clearly below the mean of the first."""
    watch = learned(subject)
    if not watch.fell():
        early, late = watch.losses[:WINDOW], watch.losses[-WINDOW:]
        what = "no term of any player falls" if watch.players else "the loss does not fall"
        raise Fault(
            f"{what} on one batch in {STEPS} steps: {sum(early) / len(early):.4g} at first, "
            f"{sum(late) / len(late):.4g} at last"
        )


def repeats(subject: Subject) -> None:
    """The same seed gives the same losses and weights, bit for bit, whatever else draws random numbers."""
    first, second = learned(subject), subject.trial.again()
    for step, (a, b) in enumerate(zip(first.losses[:FIRST], second.losses)):
        if a != b:
            raise Fault(
                f"the loss of step {step + 1} is {a!r} and, run again, {b!r}: draw from model.generator() or torch, "
                "never from numpy, random, the clock, or a stream that the step does not reseed"
            )
    for name, value in first.weights.items():
        if not same(value, second.weights[name]):
            raise Fault(f"after {FIRST} steps {name} differs between two runs with the same seed and the same losses")
