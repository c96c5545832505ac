"""Activations: the data module that feeds what a frozen subject holds at a site."""

from __future__ import annotations

from typing import Any

import torch

from quire.contracts import Batch, Component
from quire.data import DataModule, few
from quire.datasets.activations import beside, shards
from quire.datasets.activations.buffer import Chunk
from quire.datasets.activations.feed import Chunks, Feed, InOrder, Samples, as_batch
from quire.datasets.activations.forwards import Forwards, described, moved
from quire.datasets.activations.ranks import gathered, mine
from quire.datasets.activations.rows import Rows
from quire.datasets.activations.studied import Studied
from quire.errors import ConfigError, DataError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Activations(Studied):
    """What a frozen subject holds at a site, row by row, through a mixing buffer; or from a harvested folder.

    Special tokens and padding are told by masks; x and its gradient stay one row. Training rows are mixed over many
    samples, evaluation rows come in order. The place, to the row, is kept with the checkpoint.

    Args:
        subject: ``tiny``, ``tiny-30s``, a Quire checkpoint, a transformers folder or hub name, or a component; null
            with ``folder``.
        site: ``blocks.i.resid|resid_pre|mlp_out|attn_out|z|heads``, or a module's path; several are read in one pass.
        source: What ``TextTokens`` takes, or a data module in the subject's own tokens (or pictures).
        length: Tokens of a row of text; default 128, or the subject's own limit.
        contexts: Source rows in one forward pass.
        batch_size: Rows a batch; samples in analysis.
        dtype: What rows are kept in: ``float32``, ``bfloat16`` or ``float16``; batches are fp32.
        buffer: Most rows that are mixed.
        keep: Share of the buffer that stays behind at each refill, in [0, 1).
        with_grad: Also ``grad``, the derivative of the subject's next-token loss, summed over the row.
        drop_special: Feed no special tokens.
        target_site: Another site, given as ``target``, for transcoders.
        folder: A folder that ``quire harvest`` wrote, in place of running the subject.
        analysis: Batches of whole samples, [B,T,·] with ``mask``, and at z and heads sites ``pattern`` and ``value``.
        **kwargs: Arguments of ``DataModule``; ``train_samples`` counts source rows.

    Returns:
        ``activation`` [N,D], ``position`` [N], ``special`` [N] bool, ``instance`` [N] (the source row); ``token`` [N]
        of text; ``grad``, ``target``, ``head`` and ``label`` where they exist. With several sites also
        ``activation@SITE`` each, and ``states`` [N,S,D] where they are equally wide.

    Raises:
        ConfigError: no such subject or site, wrong sizes, or a folder of something else.
        DataError: no token to feed, or activations that are not finite.
    """

    fields = ("activation", "position", "special", "instance")

    def __init__(
        self,
        subject: Component | str | None = "tiny",
        site: str | list[str] = "blocks.1.resid",
        source: DataModule | str = "stdlib",
        length: int | None = None,
        contexts: int = 32,
        batch_size: int = 4096,
        dtype: str = "float32",
        buffer: int = 262_144,
        keep: float = 0.5,
        with_grad: bool = False,
        drop_special: bool = False,
        target_site: str | None = None,
        folder: str | None = None,
        analysis: bool = False,
        **kwargs: Any,
    ) -> None:
        sites = [site] if isinstance(site, str) else list(site)
        super().__init__(subject, sites, source, length, target_site, folder, batch_size=batch_size, **kwargs)
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"data.site must name one or more different sites, got {site}")
        if dtype not in DTYPES:
            raise ConfigError(f"data.dtype is {', '.join(DTYPES)}, got {dtype!r}")
        if contexts < 1:
            raise ConfigError(f"data.contexts must be at least 1, got {contexts}")
        if self.num_workers:
            raise ConfigError("data.num_workers must be 0: the subject runs in the main process, on its device")
        if subject is None and (folder is None or analysis):
            raise ConfigError("data.subject is null: name a subject (a folder holds rows only, no whole samples)")
        self.contexts, self.dtype, self.capacity, self.keep = contexts, dtype, buffer, keep
        self.with_grad, self.drop_special, self.analysis = with_grad, drop_special, analysis
        if not analysis:
            Feed(_Nothing(), self.batch_size, buffer, keep, self.seed, dict)
        self._feed: Feed | None = None
        self._restored: dict[str, Any] | None = None
        self._offer(("token",) if isinstance(source, str) else ())

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary of what a small language model with random weights holds."""
        small = {"class_path": "CausalLM", "init_args": {"width": 16, "depth": 2, "heads": 2, "rope": False}}
        data = {"subject": small, "source": "stdlib:docs", "length": 16, "train_samples": 256}
        run = {"class_path": cls.__name__, "init_args": {**data, "batch_size": 64, "buffer": 1024}}
        encoder = {"class_path": "SparseEncoder", "init_args": {"latents": 32}}
        return {
            "model": {"encoder": encoder, "decoder": "SparseDecoder", "objective": "SparseReconstruction"},
            "data": run,
        }

    # ---- rows
    def rows(self, name: str) -> Rows:
        """One split of the source. Override it to feed other samples, such as ``Instances`` of a chat."""
        data: Any = self.source.dataset(name)
        if name == "train" and self.train_samples is not None:
            data = few(data, self.train_samples, self.seed)
        subject = self.studied()
        constant = None
        if not (hasattr(data, "lengths") or "tokens" in getattr(data, "tensors", {})):
            batch = moved(Rows(data, 1, False, 1, 0).batch([0]), subject.device)
            like = subject.sites.read(batch, self.sites[:1]).values[self.sites[0]]
            about = described(subject, batch, like)
            fed = about["mask"] & ~about["special"] if self.drop_special else about["mask"]
            constant = int(fed.sum())
        return Rows(data, self.contexts, self.drop_special, constant, self.seed)

    def chunks(self, name: str) -> Chunks:
        """Rows of one split: forward passes, or pieces of the folder.

        Raises:
            DataError: nothing to feed.
        """
        if self.folder is not None:
            made: Any = shards.Shards(self.folder / name, self.seed)
            shards.compare(self.folder / name, made.header, self.record(made.header))
        else:
            made = self.forwards(name)
        if not made.fed(made.plan(0, False)):
            why = "all tokens are padding or special; set drop_special: false" if self.drop_special else "no real token"
            raise DataError(f"{type(self).__name__}: the {name} split has nothing to feed: {why}")
        return made

    def forwards(self, name: str) -> Forwards:
        """Forward passes over one split, whether there is a folder or not."""
        return Forwards(
            self.studied(),
            self.rows(name),
            self.sites,
            self.target_site,
            self.with_grad,
            self.drop_special,
            DTYPES[self.dtype],
        )

    def record(self, header: dict[str, Any] | None = None) -> dict[str, Any]:
        """What rows depend on, for a harvested folder's header; without a subject only what is asked for here."""
        said: dict[str, Any] = {"site": self.sites, "dtype": self.dtype, "target_site": self.target_site}
        said["drop_special"] = self.drop_special
        if self.with_grad or header is None:
            said["with_grad"] = self.with_grad
        if self.subject is not None:
            said |= {"fingerprint": self.subject.fingerprint}
            if self.tokenizer is not None:
                said["tokenizer"] = self.tokenizer.fingerprint
        return said

    # ---- run
    def setup(self, stage: str) -> None:
        """Move the subject to the run's device and say which fields there are."""
        if self.trainer is not None:
            if self.subject is not None:
                self.subject.to(self.trainer.strategy.root_device)
            self._apart = beside.write_beside(self.trainer)
        if self.folder is not None and self._subject is None:
            self._offer(tuple(self._header()["fields"]))
            return
        offered = getattr(self.source, "fields", ())
        self._offer(tuple(new for old, new in (("tokens", "token"), ("label", "label")) if old in offered))

    def _offer(self, more: tuple[str, ...]) -> None:
        some = [n for n, on in (("grad", self.with_grad), ("target", self.target_site)) if on]
        some += ["states", *(f"activation@{s}" for s in self.sites)] if len(self.sites) > 1 else []
        some += ["head"] if any(s.endswith(".heads") for s in self.sites) else []
        some += ["mask", "tokens", "index", "pattern", "value"] if self.analysis else []
        self.fields = tuple(dict.fromkeys([*type(self).fields, *more, *some]))  # type: ignore[misc, assignment]

    def train_dataloader(self) -> Any:
        """Mixed rows; a tail shorter than a batch is dropped."""
        if self.analysis:
            return self._samples("train", True)
        world, rank = self._place()
        chunks = self.chunks("train")
        self._feed = Feed(
            chunks,
            self.batch_size,
            self.capacity,
            self.keep,
            self.seed,
            self._batch,
            rank,
            world,
            None if self.trainer is None else lambda: self.trainer.current_epoch,  # type: ignore[union-attr]
            self._device,
        )
        if not len(self._feed):
            fed = chunks.fed(chunks.plan(0, True, rank, world))
            raise ConfigError(
                f"data.batch_size is {self.batch_size}, but {type(self).__name__} has {fed} training rows: lower it"
            )
        if self._restored:
            state, self._restored = self._restored, None
            self._take_up(state, world, rank)
        return self._feed

    def val_dataloader(self) -> Any:
        """In order."""
        return self._ordered("val")

    def test_dataloader(self) -> Any:
        """In order."""
        return self._ordered("test")

    def predict_dataloader(self) -> Any:
        """The test split, in order."""
        return self._ordered("test")

    def _ordered(self, name: str) -> Any:
        if self.analysis:
            return self._samples(name, False)
        if self.folder is not None and not (self.folder / name).is_dir():
            return []  # nothing of this split was harvested
        world, rank = self._place()
        return InOrder(self.chunks(name), self.batch_size, self._batch, rank, world)

    def _samples(self, name: str, shuffle: bool) -> Samples:
        rows, (world, rank) = self.rows(name), self._place()
        rows.contexts = self.batch_size
        tell = None if self.trainer is None or not shuffle else lambda: self.trainer.current_epoch  # type: ignore[union-attr]
        return Samples(lambda epoch: rows.plan(epoch, shuffle, rank, world), lambda i: self.sample(rows.batch(i)), tell)

    def sample(self, batch: Batch) -> Batch:
        """A batch of the source with what the site holds beside it: whole samples, for analysis."""
        subject = self.studied()
        batch = moved(batch, subject.device)
        place = subject.sites.place(self.sites[0])
        found = subject.sites.read(batch, self.sites, grad=self.with_grad, pattern=bool(place.heads))
        first = found.values[self.sites[0]]
        about = described(subject, batch, first)
        out: Batch = {**batch, "activation": first.float(), **{k: about[k] for k in ("mask", "special", "position")}}
        if self.with_grad:
            out["grad"] = found.grads[self.sites[0]].float()
        if len(self.sites) > 1:
            out |= {f"activation@{s}": x.float() for s, x in found.values.items()}
        if place.heads:
            out |= {"pattern": found.patterns[place.site], "value": found.attended[place.site].float()}
        return out

    def _batch(self, rows: Chunk) -> Batch:
        widths = [] if len(self.sites) == 1 else [self.widths()[s] for s in self.sites]
        return as_batch(rows, self.sites, widths)

    def _place(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.folder is not None or self.subject is None else self.subject.device

    # ---- resume
    def state_dict(self) -> dict[str, Any]:
        """The feed's place and buffer, of every rank; the rows go to a file beside the checkpoint."""
        if self._feed is None or self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        return gathered(*self._feed.state(), self._place()[0])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Taken up when training starts."""
        self._restored = state

    def _take_up(self, state: dict[str, Any], world: int, rank: int) -> None:
        assert self._feed is not None
        rows = state.get(beside.KEY)
        if rows is None:
            rows = beside.read_rows(state["rows"]) if "rows" in state else {}
        self._feed.restore(*mine(state, rows, world, rank))


class _Nothing:
    """A source of no rows."""

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[Any]:
        return []

    def fed(self, plan: list[Any]) -> int:
        return 0

    def read(self, what: Any) -> Chunk:
        return {}
