"""What is wrong with a plugin's hooks, told to its author: pluggy passes over most of it in silence."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path

from tars_core import hookspecs
from tars_core.types.errors import PluginError

_PREFIX = "tars_"
_MARK = f"{hookspecs.PROJECT}_impl"  # where pluggy's marker leaves its note
_HOOKS = {
    name: [argument for argument in inspect.signature(hook).parameters if argument != "self"]
    for name, hook in vars(hookspecs.TarsSpec).items()
    if name.startswith(_PREFIX)
}


def check(plugin: object) -> None:
    """Raise :class:`~tars_core.types.errors.PluginError` for the first mistake: the rule, the line, and the fix."""
    found = {name: getattr(plugin, name, None) for name in dir(plugin) if name.startswith(_PREFIX)}
    functions = {name: function for name, function in found.items() if inspect.isroutine(function)}
    for name, function in functions.items():
        is_marked = hasattr(function, _MARK)
        near = difflib.get_close_matches(name, _HOOKS, n=1, cutoff=0.8)
        if name in _HOOKS and not is_marked:
            raise PluginError(f"{name}{_place(function)} has no @hookimpl, so it would never be called")
        if name not in _HOOKS and (is_marked or near):
            known = f"did you mean {near[0]}?" if near else f"hooks are {', '.join(_HOOKS)}"
            raise PluginError(f"{name}{_place(function)} is not a hook; {known}")
        if name in _HOOKS:
            _check_arguments(name, function)
    if not any(name in _HOOKS for name in functions):
        what = getattr(plugin, "__name__", type(plugin).__name__)
        raise PluginError(f"{what} implements no hook; a backend has at least tars_probe and tars_load")


def _check_arguments(name: str, function: object) -> None:
    parameters = inspect.signature(function).parameters if callable(function) else {}
    unknown = [argument for argument in parameters if argument not in _HOOKS[name] and argument != "self"]
    if unknown:
        takes = f"it may take {', '.join(_HOOKS[name])}" if _HOOKS[name] else "it takes no arguments"
        raise PluginError(f"{name}{_place(function)} has the argument {unknown[0]}, which it is never given; {takes}")


def _place(function: object) -> str:
    """Return `` (file.py, line 7)`` of a function."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code is not None else ""
