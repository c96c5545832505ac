"""Whether a representation is alive, told without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from quire.contracts import Batch, Encoder, Objective
from quire.data import mix
from quire.errors import ConfigError
from quire.roles.probes.features import check_class_token, check_pooling, pooled
from quire.roles.probes.geometry import Moments, agreement, alignment, effective_rank, uniformity
from quire.roles.probes.perturb import perturb
from quire.roles.probes.probe import TINY_VIT, tiny_run
from quire.roles.probes.report import write
from quire.roles.probes.subject import Subject
from quire.roles.probes.watch import Watch
from quire.roles.tokens.contract import Tokens


class Health(Watch):
    """Label-free monitor of the codes: rank, spread, views, gradients; warns of collapse and draws the run as a PNG.

    Logged after ``val/health/`` each time:

    - ``effective_rank``: exp of the entropy of the normalised singular values of the pooled codes.
    - ``std``: standard deviation per dimension over all real tokens (or vectors), mean over dimensions; ``std_pooled``
      over pooled codes; ``std_NAME`` over a target that the objective names.
    - ``alignment``, ``uniformity``: of pooled codes on the unit sphere; the second view of a sample is the input with
      a little noise.
    - ``neighbours``: share of samples whose nearest other sample stays the same when their input gets that noise.
    - ``dead``: share of code dimensions that never change.
    - ``gradient_norm``: mean over the training steps seen, one every ``log_every_n_steps`` and at least one.
    - ``NAME_over_chance``: a logged pretext metric divided by its value at chance.

    An objective takes part by two optional members: a method ``health_targets(model, batch)`` returning vectors
    [..., D] by name, and an attribute ``chance``, the chance level by metric name.

    Args:
        every: Epochs between two measurements; 0 is only at the end of ``fit``, in ``validate`` and ``test``.
        floor: A warning names each ``std`` (not ``std_pooled``) below this, in the codes' own unit.
        noise: Size of the perturbation: of float inputs in their standard deviations, of tokens the share replaced.
        max_samples: At most this many samples of the split.
        pooling: ``mean`` over real tokens, or ``class``.
        label: Name in the log.

    Needs:
        encoder: any whose codes have a vector a sample. No labels.

    Raises:
        ConfigError: ``floor`` or ``noise`` negative, ``max_samples`` below 3, class pooling without a class token.
    """

    encoder: Encoder

    def __init__(
        self,
        every: int = 1,
        floor: float = 0.1,
        noise: float = 0.1,
        max_samples: int = 2000,
        pooling: Literal["mean", "class"] = "mean",
        label: str = "health",
    ) -> None:
        super().__init__(label, every)
        check_pooling(pooling, self)
        if floor < 0 or noise < 0 or max_samples < 3:
            raise ConfigError(
                "Health needs floor and noise of at least 0 and max_samples of at least 3, "
                f"got {floor}, {noise} and {max_samples}"
            )
        self.floor, self.noise, self.max_samples, self.pooling = floor, noise, max_samples, pooling
        self.rows: list[dict[str, Any]] = []
        self._norms: list[Tensor] = []
        self._low: set[str] = set()

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Watch a small ViT that learns digits."""
        return tiny_run("Health", TINY_VIT)

    def fits(self, encoder: Encoder) -> None:
        """Class pooling needs a class token."""
        check_class_token(encoder.sizes(), self.pooling, self)

    # ---- measuring
    def measure(self, subject: Subject, split: str, epoch: int = 0, step: int = 0) -> dict[str, float]:
        """All numbers that need only the encoder, its objective and the split."""
        moments: dict[str, Moments] = {}

        def add(name: str, rows: Tensor) -> None:
            found = Moments.of(rows)
            moments[name] = moments[name] + found if name in moments else found

        def read(batch: Batch) -> tuple[Tensor, None]:
            codes = subject.encoder(batch)
            add("std", _rows(codes))
            for name, target in _targets(subject.model, batch).items():
                add(f"std_{name}", target)
            views = [pooled(codes, self.pooling)]
            generator = torch.Generator(subject.device).manual_seed(mix(subject.seed, 3, int(batch["index"][0])))
            if (other := perturb(batch, self.noise, generator)) is not None:
                views.append(pooled(subject.encoder(other), self.pooling))
            return torch.stack(views, 1), None

        views = subject.collect(read, split, self.max_samples).values
        if len(views) < 3:
            raise ConfigError(f"Health needs at least 3 samples in the {split} split, it has {len(views)}")
        whole = _joined(subject.gather(moments))
        clean = views[:, 0]
        found = {"/effective_rank": effective_rank(clean)}
        found |= {f"/{name}": float(m.std.mean()) for name, m in whole.items()}
        found |= {"/std_pooled": float(clean.double().std(0, unbiased=False).mean()), "/uniformity": uniformity(clean)}
        if views.shape[1] > 1:
            found |= {"/alignment": alignment(clean, views[:, 1]), "/neighbours": agreement(clean, views[:, 1])}
        found["/dead"] = _dead(whole["std"])
        self.rows.append({"split": split, "epoch": epoch, "step": step} | {k[1:]: v for k, v in found.items()})
        self._warn(epoch, {k[1:]: v for k, v in found.items() if k[1:] in whole})
        return found

    def extra(self, trainer: Trainer, model: Any, split: str) -> dict[str, float]:
        """Gradient norm and pretext metrics over chance."""
        found: dict[str, float] = {}
        if self._norms:
            found["/gradient_norm"] = float(torch.stack(self._norms).mean())
            self._norms = []
        for name, level in _chances(model.objective).items():
            value = trainer.callback_metrics.get(f"{split}/{name}")
            if value is not None and level > 0:
                found[f"/{name}_over_chance"] = float(value) / level
        self.rows[-1].update({k[1:]: v for k, v in found.items()})
        return found

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the gradient's norm, on logging steps and at least once; the gradient stays as it is."""
        if not self._norms or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            found = [p.grad.detach() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if found:
                self._norms.append(torch.nn.utils.get_total_norm(found))

    def _warn(self, epoch: int, spreads: dict[str, float]) -> None:
        low = {name for name, value in spreads.items() if value < self.floor}
        for name in sorted(low - self._low):
            what = "the codes" if name == "std" else name.removeprefix("std_")
            rank_zero_warn(
                f"Health: the standard deviation of {what} is {spreads[name]:.3g} at epoch {epoch}, under the floor "
                f"{self.floor:g}: the representation may be collapsing"
            )
        self._low = low

    # ---- showing
    def show(self, folder: Path) -> str:
        """Write every measurement, draw them; the last one as a line."""
        write(self.rows, folder, self.prefix)
        draw(self.rows, self.floor, folder / f"{self.prefix}.png")
        last = {k: v for k, v in self.rows[-1].items() if isinstance(v, float)}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in last.items())
        return f"{self.prefix}: {shown}"

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        return {**super().state_dict(), "rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history."""
        super().load_state_dict(state_dict)
        self.rows = [dict(row) for row in state_dict["rows"]]


def draw(rows: list[dict[str, Any]], floor: float, file: Path) -> None:
    """One small curve a number, over optimizer steps; the floor is dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, float)))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(2.6 * columns, 1.9 * lines), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, place + 1)
        for split in dict.fromkeys(row["split"] for row in rows):
            own = [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]
            axes.plot([x for x, _ in own], [y for _, y in own], ".-", markersize=4, linewidth=1, label=split)
        if name.startswith("std") and name != "std_pooled":
            axes.axhline(floor, color="#b03a2e", linestyle="--", linewidth=0.8)
        axes.set_title(name.replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if place // columns == lines - 1:
            axes.set_xlabel("step", fontsize=7)
    figure.savefig(str(file), dpi=140)


def _rows(codes: Any) -> Tensor:
    """Every real token, or every vector, as a row."""
    if isinstance(codes, Tokens):
        return codes.values[codes.mask] if codes.padded else codes.values.flatten(0, 1)
    latents = getattr(codes, "latents", None)
    return latents.flatten(0, 1) if isinstance(latents, Tensor) else pooled(codes)


def _members(objective: Any) -> list[Objective]:
    return [m for m in objective.modules() if isinstance(m, Objective)] if objective is not None else []


def _targets(model: Any, batch: Batch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for member in _members(getattr(model, "objective", None)):
        if (ask := getattr(member, "health_targets", None)) is not None:
            found |= ask(model, batch)
    return found


def _chances(objective: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for member in _members(objective):
        found |= {name: float(level) for name, level in (getattr(member, "chance", None) or {}).items()}
    return found


def _joined(everyone: list[dict[str, Moments]]) -> dict[str, Moments]:
    whole: dict[str, Moments] = {}
    for moments in everyone:
        for name, found in moments.items():
            whole[name] = whole[name] + found if name in whole else found
    return whole


def _dead(codes: Moments) -> float:
    size = (codes.square / codes.count).sqrt().max()
    return float((codes.std <= 1e-6 * size).double().mean())
