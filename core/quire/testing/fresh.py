"""What runs in a fresh process: ``python -m quire.testing.fresh PLUGIN CONFIG REPORT STAGES``.

One process serves several checks, because it pays for its imports once: the plugin is imported without the network,
then trains through the console script, then once more as the first of two processes.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from quire.testing.offline import offline

SHORT = [
    "--trainer.max_steps=2",
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]
STAGES = ("hooks", "modules", "fit", "ddp")


def hooks(plugin: str) -> str | None:
    """The plugin registers without torch and without the network."""
    os.environ["QUIRE_PLUGINS"] = plugin
    from quire.plugins import load

    with offline() as asked:
        record = load().records[plugin]
    if record.error:
        return f"{plugin} does not load: {record.error}"
    if asked:
        return f"importing {record.module} uses the network ({asked[0]}): fetch nothing at import"
    if "torch" in sys.modules:
        return f"importing {record.module} imports torch: keep hooks in it, register paths, import in the components"
    return None


def modules(plugin: str) -> str | None:
    """Every module that holds a component imports, registers nothing more, and leaves the network alone."""
    from quire.plugins import load

    before = set(load().registry.entries)
    for name in sorted({e.module for e in load().registry if e.plugin == plugin}):
        with offline() as asked:
            try:
                importlib.import_module(name)
            except Exception as error:  # a stranger's module fails in its own way
                return f"{name} can't be imported: {type(error).__name__}: {error}"
        if asked:
            return f"importing {name} uses the network ({asked[0]}): fetch nothing at import"
    added = set(load().registry.entries) - before
    return f"importing a component registers {sorted(added)[0]}: register in the hook only" if added else None


def script() -> str:
    """The console script ``lightning`` beside this Python."""
    for name in ("lightning", "lightning.exe"):
        file = Path(sys.executable).parent / name
        if file.is_file():
            return str(file)
    raise FileNotFoundError(f"no console script lightning beside {sys.executable}: pip install quire")


def _script(config: str, *more: str) -> str | None:
    file = script()
    sys.argv = [file, "fit", "-c", config, *SHORT, *more]
    os.environ["QUIRE_TRACE"] = "1"  # the author sees where it happened
    try:
        with offline() as asked:
            runpy.run_path(file, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            return f"lightning fit ended with exit code {stop.code}"
    return f"lightning fit used the network ({asked[0]}): use embedded data" if asked else None


def main(plugin: str, config: str, report: str, stages: str) -> None:
    """Run the stages and write what each found; a stage whose process dies leaves no line."""
    steps: dict[str, Callable[[], str | None]] = {
        "hooks": lambda: hooks(plugin),
        "modules": lambda: modules(plugin),
        "fit": lambda: _script(config),
        "ddp": lambda: _script(config, "--trainer.devices=2", *_strategy(config)),
    }
    for stage in stages.split(","):
        try:
            said = steps[stage]()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        with open(report, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"stage": stage, "said": said}) + "\n")


def _strategy(config: str) -> list[str]:
    text = Path(config).read_text(encoding="utf-8")
    return [] if "strategy:" in text else ["--trainer.strategy=ddp"]


if __name__ == "__main__":
    main(*sys.argv[1:])
