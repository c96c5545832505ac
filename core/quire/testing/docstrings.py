"""Docstrings say what a user of the YAML needs: the paper, the arguments, shapes, errors."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from typing import Any

from quire.contracts import Component
from quire.testing.subject import Subject
from quire.testing.verdict import Fault

PAPER = re.compile(r"\b(19|20)\d\d\b|\bet al\b|arXiv", re.I)
SHAPE = re.compile(r"\[[A-Z][\w'*+/ -]*[\],]")
QUIET = ("NotImplementedError", "AssertionError", "AttributeError", "StopIteration")


def documented(subject: Subject) -> None:
    """A summary line, the paper, every argument, the errors, and shapes where there are some."""
    name, cls = subject.name, subject.cls
    own = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    first, _, rest = own.partition("\n")
    if len(first) < 15 or not first.rstrip("`*").endswith(".") or (rest.strip() and not rest.startswith("\n")):
        raise Fault(f"{name}'s docstring must start with a summary of one line that ends with a full stop")
    if subject.entry.plugin != "core":
        module = sys.modules[cls.__module__].__doc__ or ""
        if not PAPER.search(own) and not PAPER.search(module):
            raise Fault(f"{name}'s docstring names no source: add the paper, as 'Zhai et al. 2022', or an arXiv number")
    _arguments(name, cls)
    _errors(name, cls, own)
    texts = [own, *(inspect.getdoc(f) or "" for f in vars(cls).values() if inspect.isfunction(f))]
    if subject.entry.kind in ("encoder", "decoder") and not any(SHAPE.search(t) for t in texts):
        raise Fault(f"{name}'s docstrings give no shape: say what it takes and returns, such as [B,N,D]")
    if subject.entry.kind == "objective" and not any(SHAPE.search(t) or "Returns:" in t for t in texts):
        raise Fault(f"{name}'s docstring does not say what it returns: add Returns with each term and its unit")


def _arguments(name: str, cls: type) -> None:
    said: set[str] = set()
    for base in cls.__mro__:
        if base is not Component:
            said |= argument_names(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    constructor: Any = cls.__init__  # type: ignore[misc]
    for parameter in list(inspect.signature(constructor).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in said:
            raise Fault(f"{name}'s docstring does not explain the argument {parameter.name}: add it under Args")


def argument_names(doc: str) -> set[str]:
    """The names explained under ``Args:``."""
    found: set[str] = set()
    inside = False
    for line in doc.splitlines():
        if re.match(r"Args:\s*$", line):
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            inside = False
        elif inside and (match := re.match(r" {2,4}([\w*`, ]+?)(?: \([^)]*\))?:", line)):
            found |= {n.strip(" *`") for n in match[1].split(",")}
    return found


def _errors(name: str, cls: type, own: str) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    if re.search(r"\bRaises?\b", own):
        return
    for function in [n for n in tree.body if isinstance(n, ast.FunctionDef)]:
        if re.search(r"\bRaises?\b", ast.get_docstring(function) or ""):
            continue
        for node in ast.walk(function):
            error = _raised(node)
            if error:
                raise Fault(f"{name}.{function.name} can raise {error}, which its docstring does not say: add Raises")


def _raised(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Raise) or node.exc is None:
        return None
    what = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    name = what.id if isinstance(what, ast.Name) else what.attr if isinstance(what, ast.Attribute) else ""
    return name if name.endswith("Error") and name not in QUIET else None
