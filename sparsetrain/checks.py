"""Checks of arguments: each returns the value as it will be used, or says what came and what was wanted."""

import difflib
import fnmatch
import math
import operator


def one_of(argument, value, choices):
    """value, which must be one of the strings `choices`; the ValueError lists them, near matches first."""
    choices = list(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=2)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{argument} is {value!r}, must be one of {', '.join(choices)}{hint}")


def integer(argument, value, low=None, high=None):
    """value as an int within [low, high]; anything but an integer is a TypeError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument} is {value!r}, must be an int") from None
    return _within(argument, value, low, high)


def number(argument, value, low=None, high=None):
    """value as a finite float within [low, high]; anything but a number is a TypeError."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument} is {value!r}, must be a number") from None
    if not math.isfinite(result):
        raise ValueError(f"{argument} is {value}, must be finite")
    return _within(argument, result, low, high)


def flag(argument, value):
    """value, which must be True or False; anything else is a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is {value!r}, must be True or False")
    return value


def pair(argument, value, low=0):
    """(vertical, horizontal) from an int or a pair of ints, each at least `low`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{argument} is {value!r}, must be an int or a pair of ints")
    return tuple(integer(argument, v, low) for v in values)


def fraction(argument, value):
    """value as a float in [0, 1): a sparsity, a dropout rate."""
    result = number(argument, value)
    if not 0 <= result < 1:
        raise ValueError(f"{argument} is {value}, must be in [0, 1)")
    return result


def globs(argument, value, names):
    """value, of names or globs, each of which must match one of the layers `names`; "*" may match none."""
    for glob in value:
        if glob != "*" and not fnmatch.filter(names, glob):
            raise ValueError(f"{argument} has {glob!r}, which matches none of the layers {', '.join(names)}")
    return value


def _within(argument, value, low, high):
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f">= {low}" if high is None else f"<= {high}" if low is None else f"in [{low}, {high}]"
        raise ValueError(f"{argument} is {value}, must be {wanted}")
    return value
