"""The console scripts ``quire`` and ``lightning``: one program. Commands that need no torch import none."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from quire.errors import ConfigError, QuireError, suggest
from quire.plugins import load, load_object, tracing

LIGHTNING = ("fit", "validate", "test", "predict")


def main(argv: list[str] | None = None) -> None:
    """Run a command; the process exits with 0, 2 for a wrong command or config, 1 for a fault while running."""
    code = execute(sys.argv[1:] if argv is None else argv)
    if any(name in thread for thread in threads() for name in ("gloo", "tcpstore")):
        leave(code)
    if code:
        sys.exit(code)


def threads() -> list[str]:
    """Names of this process's threads, those of PyTorch included; empty where the system doesn't tell."""
    found = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            found.append(file.read_text().strip())
    return found


def leave(code: int) -> NoReturn:
    """End as Python does, up to its own shutdown, which a process group's threads now and then abort.

    PyTorch's caches of sharded tensors keep a group, and so its threads, beyond its end.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def execute(argv: list[str]) -> int:
    """Run a command and return its exit code; errors are one sentence on stderr unless ``QUIRE_TRACE=1``."""
    try:
        return _dispatch(argv)
    except QuireError as error:
        return _fail(error, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a stranger's code may raise anything; the user gets a sentence, the trace on request
        known = next((e for e in _chain(error) if isinstance(e, QuireError)), None)
        if known is not None:
            return _fail(error, str(known), known.exit_code)
        if type(error).__name__ == "MisconfigurationException":  # Lightning's word for a wrong argument
            return _fail(error, str(error), 2)
        return _fail(error, f"{type(error).__name__}: {error}; QUIRE_TRACE=1 shows where it happened", 1)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from quire import __version__

        print(f"quire {__version__}")
        return 0
    if argv[0] in LIGHTNING:
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        from quire.cli import run

        try:
            run(argv)
        except SystemExit as stop:  # --help and --print_config end this way
            return int(stop.code or 0) if isinstance(stop.code, int) or stop.code is None else 2
        return 0
    commands = load().commands
    if argv[0] not in commands:
        raise ConfigError(
            f"no command {argv[0]}{suggest(argv[0], [*LIGHTNING, *commands]) or '; quire --help lists them'}"
        )
    try:
        return int(load_object(commands[argv[0]][0])(argv[1:]) or 0)
    except SystemExit as stop:
        return int(stop.code or 0) if isinstance(stop.code, int) or stop.code is None else 2


def usage() -> str:
    """What ``quire --help`` prints."""
    own = "\n".join(f"  {name:<12} {about}" for name, (_, about, _) in sorted(load().commands.items()))
    return (
        "usage: quire COMMAND [options]   (lightning is the same program)\n\n"
        "Lightning's commands, with -c FILE or -c plugin/name:\n"
        "  fit          train\n  validate     evaluate on the validation split\n"
        "  test         evaluate on the test split\n  predict      draw from the sampler, or encode\n\n"
        f"Quire's:\n{own}\n\n"
        "QUIRE_PLUGINS=mp3,gsae loads only these plugins; QUIRE_TRACE=1 shows full tracebacks."
    )


def _chain(error: BaseException) -> list[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link = link.__cause__ or link.__context__
    return seen


def _fail(error: BaseException, message: str, code: int) -> int:
    if tracing():
        raise error
    if "Original Traceback" in message:  # what a loader's process sends: its whole trace, the reason in the last line
        message = message.strip().splitlines()[-1].removeprefix("quire.errors.").partition(": ")[2]
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
