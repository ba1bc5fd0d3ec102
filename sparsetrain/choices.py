"""What the planner chose: each choice by what it depends on, written to a file and read back.

Every choice is a function of whole numbers and the instruction set, so two processes choose the same.
"""

import functools
import json

from sparsetrain._kernels import core
from sparsetrain.files import read_json, replacing

FORMAT, SCHEMA = "sparsetrain plans", 1

_kinds = {}  # kind: (names of what a choice depends on, names of what it says, its check)
_chosen = {}  # (kind, instruction set, what it depends on): what it says
_edition = 0


def kept(kind, about, says, check):
    """A function that chooses: what it returns is kept, and taken from a file that was loaded instead of computed.

    about: names of the whole numbers, or tuples of them, that it depends on; an argument that is no number gives some
    of them by its about(). says: names of what it returns. check(isa, about, says), both dicts, raises ValueError for a
    choice that cannot run.
    """
    _kinds[kind] = about, says, check

    def decorate(function):
        @functools.wraps(function)
        def choose(*arguments):
            depends = []
            for argument in arguments:
                depends += argument.about() if hasattr(argument, "about") else [argument]
            key = kind, core.get_isa(), tuple(map(_plain, depends))
            if key not in _chosen:
                found = function(*arguments)
                _chosen[key] = tuple(map(_plain, found if len(says) > 1 else (found,)))
            found = _chosen[key]
            return found if len(says) > 1 else found[0]

        return choose

    return decorate


def _plain(value):
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else int(value)


def edition():
    """A number that is another one after each load(): plans that were made before do not count any more."""
    return _edition


def save(path):
    """Write every choice that this process has made or loaded, as JSON that load() takes."""
    lines = []
    for (kind, isa, depends), said in sorted(_chosen.items()):
        about, says, _ = _kinds[kind]
        entry = {"choice": kind, "isa": isa, "for": dict(zip(about, depends, strict=True))}
        lines.append(json.dumps(entry | {"is": dict(zip(says, said, strict=True))}))
    with replacing(path) as file:
        head = json.dumps({"format": FORMAT, "schema": SCHEMA})[:-1]
        file.write(f'{head}, "choices": [\n' + ",\n".join(lines) + "\n]}\n")


def load(path):
    """Choose as the file says from now on, where it has the case; how many choices it has.

    ValueError, and nothing is changed, if the file is malformed, of another schema, or has a choice that this machine
    cannot run; OSError if it cannot be read.
    """
    global _edition
    found = read_json(path, FORMAT, SCHEMA)
    if not isinstance(found.get("choices"), list):
        raise ValueError(f"{path} has no list 'choices'")
    read = {}
    for number, entry in enumerate(found["choices"]):
        try:
            key, said = _checked(entry)
            if key in read:
                raise ValueError("the same case again")
        except ValueError as error:
            raise ValueError(f"{path}: choices[{number}]: {error}") from None
        read[key] = said
    _chosen.update(read)
    _edition += 1
    return len(read)


def clear():
    """Forget all choices, those loaded too."""
    global _edition
    _chosen.clear()
    _edition += 1


def _checked(entry):
    """(key, what it says) of an entry of a file."""
    if not isinstance(entry, dict) or entry.keys() != {"choice", "isa", "for", "is"}:
        raise ValueError("must have choice, isa, for and is")
    kind, isa = entry["choice"], entry["isa"]
    if not isinstance(kind, str) or kind not in _kinds:
        raise ValueError(f"choice is {kind!r}, must be one of {', '.join(_kinds)}")
    if isa not in core.available_isas():
        raise ValueError(f"isa is {isa!r}, this machine runs {', '.join(core.available_isas())}")
    about, says, check = _kinds[kind]
    depends, said = _numbers("for", entry["for"], about), _numbers("is", entry["is"], says)
    check(isa, dict(zip(about, depends, strict=True)), dict(zip(says, said, strict=True)))
    return (kind, isa, depends), said


# What is a tuple of so many numbers; all else is one number.
_LENGTHS = {"extent": 3, "taps": 2, "x_pixels": 2, "order": 3, "tile": 3, "output": 3}


def _numbers(name, found, wanted):
    """The values of a dict with the wanted names, whole numbers or lists of them, as a tuple."""
    if not isinstance(found, dict) or found.keys() != set(wanted):
        got = ", ".join(found) if isinstance(found, dict) else repr(found)
        raise ValueError(f"{name} has {got}, must have {', '.join(wanted)}")
    values = []
    for key in wanted:
        value, length = found[key], _LENGTHS.get(key)
        each = value if length else [value]
        if not isinstance(each, list) or len(each) != (length or 1) or any(type(v) is not int or v < 0 for v in each):
            raise ValueError(f"{key} is {value!r}, must be {f'{length} whole numbers' if length else 'a whole number'}")
        values.append(_plain(value))
    return tuple(values)
