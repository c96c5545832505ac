"""``quire bench ROLE``: measure a role's speed on this machine. Finding the role needs no torch."""

from __future__ import annotations

from quire.errors import ConfigError, suggest
from quire.plugins import load_object

ROLES: dict[str, tuple[str, str]] = {
    "language": ("quire.roles.language.bench.main", "decoding: each sampler beside transformers' generate"),
}


def main(argv: list[str]) -> int:
    """Run a role's benchmark with the arguments behind its name."""
    lines = "\n".join(f"  {name:<12} {about}" for name, (_, about) in ROLES.items())
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: quire bench ROLE [options]\n\n{lines}\n\nquire bench ROLE --help shows its options.")
        return 0
    if not argv:
        raise ConfigError(f"quire bench needs a role: {', '.join(ROLES)}")
    if argv[0] not in ROLES:
        near = suggest(argv[0], list(ROLES)) or f"; there is {', '.join(ROLES)}"
        raise ConfigError(f"no benchmark of a role {argv[0]}{near}")
    return int(load_object(ROLES[argv[0]][0])(argv[1:]) or 0)
