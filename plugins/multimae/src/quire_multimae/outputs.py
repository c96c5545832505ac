"""What each task predicts: an adapter that describes a modality, without parameters. Bachmann et al. 2022."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.recipe import instantiate
from quire.roles.tokens.contract import Layout, Segment
from quire_multimae.adapters import ModalityAdapter, PatchAdapter

Tasks = dict[str, str | ModalityAdapter]


def inputs(spec: Spec, asker: object) -> dict[str, ModalityAdapter]:
    """Adapter by modality of the encoder that the spec's codes describe, also of one that has no adapters."""
    said: Mapping[str, Any] = (spec.get("codes") or {}).get("modalities") or {}
    if said:
        made = {name: instantiate(dict(what)).named(name) for name, what in said.items()}
    else:
        segments = Layout.read(spec.code("segments", asker)).segments
        made = {s.name: _of_segment(s, spec, asker).named(s.name) for s in segments}
    for adapter in made.values():
        adapter.describe(spec)
    return made


def _of_segment(segment: Segment, spec: Spec, asker: object) -> Any:
    if len(segment.grid) != 2:
        raise ConfigError(f"{type(asker).__name__} predicts 2-D grids; {segment.name} has a {len(segment.grid)}-D one")
    values = int(spec.code("patch_values", asker))
    return PatchAdapter(list(segment.patch), channels=values // (segment.patch[0] * segment.patch[1]))


def outputs(tasks: Tasks | None, spec: Spec, asker: object) -> dict[str, ModalityAdapter]:
    """Adapter by task; without ``tasks`` one task a modality of the encoder.

    Raises:
        ConfigError: a task on a modality that the encoder lacks.
    """
    known = inputs(spec, asker)
    if tasks is None:
        return known
    made = {}
    for task, what in tasks.items():
        if isinstance(what, str):
            if what not in known:
                have = ", ".join(known)
                raise ConfigError(
                    f"task {task!r} predicts {what!r}, which the encoder lacks; it has {have}: "
                    "name an adapter for an output that isn't an input"
                )
            made[task] = known[what]
        else:
            adapter = instantiate(what).named(task)
            adapter.describe(spec)
            made[task] = adapter
    return made
