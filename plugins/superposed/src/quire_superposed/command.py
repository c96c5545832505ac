"""``quire ngrams``: count a data module's training tokens into a file, or merge such files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from quire.commands import Arguments
from quire.errors import ConfigError
from quire.plugins import load

if TYPE_CHECKING:
    from quire.data import DataModule


def main(argv: list[str]) -> int:
    """Write one safetensors file; its header says orders, vocabulary and the tokenizer's fingerprint."""
    parser = Arguments(
        prog="quire ngrams",
        description="count n-grams of a data module's training tokens, or merge such counts",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", help="a config with data, as for lightning fit; --data.KEY VALUE changes it")
    parser.add_argument("--out", required=True, help="file to write, ending in .safetensors")
    parser.add_argument(
        "--lengths", default="1,2,3,4,5", help="context lengths (default: %(default)s, bi- to six-grams)"
    )
    parser.add_argument("--shard", default="0/1", help="I/N: count only every N-th row, from row I on")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="files whose counts are added up instead")
    options, rest = parser.parse_known_args(argv)
    if not options.out.endswith(".safetensors"):
        raise ConfigError(f"quire ngrams: --out must end in .safetensors, got {options.out}")
    lengths = numbers(options.lengths, ",", "--lengths")
    if min(lengths) < 1:
        raise ConfigError(f"quire ngrams: --lengths must be at least 1, got {options.lengths}")
    if (options.config is None) == (options.merge is None):
        raise ConfigError("quire ngrams: give -c CONFIG to count, or --merge FILE FILE… to add up, one of them")
    if options.merge:
        if rest:
            raise ConfigError(f"quire ngrams: --merge takes files only, got {rest[0]}")
        store = merged(options.merge, lengths)
    else:
        from quire_superposed.stores import counted

        shard = numbers(options.shard, "/", "--shard")
        if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
            raise ConfigError(f"quire ngrams: --shard is I/N with 0 <= I < N, got {options.shard}")
        source = read_data(options.config, rest)
        source.prepare_data()
        source.setup("fit")
        store = counted(source, lengths, (shard[0], shard[1]))
    file = store.save(options.out)
    print(f"wrote {file}: {len(store)} n-grams, vocabulary {store.vocab_size} ({store.fingerprint or 'no tokenizer'})")
    return 0


def numbers(text: str, mark: str, flag: str) -> list[int]:
    """Whole numbers between marks. Raises ``ConfigError`` naming the flag."""
    try:
        return [int(part) for part in text.split(mark)]
    except ValueError as error:
        raise ConfigError(f"quire ngrams: {flag} takes whole numbers between {mark!r}, got {text!r}") from error


def merged(files: list[str], lengths: list[int]) -> Any:
    """The counts of several files added up; all must be of one tokenizer."""
    from quire.roles.language.ngrams import NGramStore

    whole = NGramStore(orders=lengths, path=files[0])
    for file in files[1:]:
        whole.merge(NGramStore(orders=lengths, path=file))
    return whole


def read_data(config: str, argv: list[str]) -> DataModule:
    """The data module of a config, with ``--data.KEY VALUE`` on top, read as ``lightning fit`` reads it.

    Raises:
        ConfigError: no such config, a config without data, an unknown name or key.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from quire.cli import find_config
    from quire.data import DataModule
    from quire.parse_errors import one_line

    path = find_config(config)
    try:
        with open(path, encoding="utf-8") as handle:
            content = yaml.safe_load(handle)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    section = content.get("data") if isinstance(content, dict) else None
    if section is None:
        raise ConfigError(f"{path} has no data: name a data module, for example data: TextTokens")
    given = [f"--data={section if isinstance(section, str) else json.dumps(section)}", *argv]
    words = {word for item in given for word in _words(item)}
    load().registry.import_named(words)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(one_line(message, words)) from ex

    parser = Parser(prog="quire ngrams")
    parser.add_subclass_arguments(DataModule, "data")
    return parser.instantiate(parser.parse_args(given)).data


def _words(item: str) -> list[str]:
    import re

    return re.split(r"[=\s\[\]{},:\"']+", item)
