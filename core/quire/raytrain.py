"""``quire ray``: an unchanged config on the workers of a Ray cluster, by Ray Train."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from quire.commands import Arguments
from quire.errors import ConfigError

LAUNCH = {"strategy": "RayDDPStrategy", "plugins": "RayLightningEnvironment"}


def main(argv: list[str]) -> int:
    """``quire ray --workers 2 fit -c FILE …``: what follows is one of Lightning's commands.

    Ray's usual ways to find a cluster hold (``RAY_ADDRESS``); without one a cluster is started here. The working
    folder must be seen by all workers: the run writes into its ``runs/`` as without Ray.
    """
    parser = Arguments(prog="quire ray", description="run one of Lightning's commands on the workers of a Ray cluster")
    parser.add_argument("--workers", type=int, default=2, help="processes; default 2")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker; default a CPU core")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="fit -c FILE and options")
    options = parser.parse_args(argv)
    from quire.__main__ import LIGHTNING

    if options.workers < 1:
        raise ConfigError(f"quire ray: --workers must be at least 1, got {options.workers}")
    if not options.command or options.command[0] not in LIGHTNING:
        raise ConfigError(f"quire ray: after the options comes one of {', '.join(LIGHTNING)}, such as fit -c FILE")
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError("quire ray needs Ray Train: pip install 'quire[ray]'") from error
    folder = os.getcwd()
    parts = {key: {"class_path": f"ray.train.lightning.{name}"} for key, name in LAUNCH.items()}
    launch = [f"--trainer.{key}={json.dumps(part)}" for key, part in parts.items()]
    task = {"argv": [*options.command, *launch, "--trainer.devices=auto"], "folder": folder}
    scaling = ScalingConfig(num_workers=options.workers, use_gpu=options.gpus)
    run = RunConfig(storage_path=os.path.join(folder, "runs", ".ray"))
    TorchTrainer(work, train_loop_config=task, scaling_config=scaling, run_config=run).fit()
    return 0


def work(task: dict[str, Any]) -> None:
    """One worker's part: the same command line, in the same folder."""
    os.chdir(task["folder"])
    from quire.__main__ import execute

    if execute(task["argv"]) != 0:
        raise RuntimeError("the command failed: its reason is above, in the worker's output")
