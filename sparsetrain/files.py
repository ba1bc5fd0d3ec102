"""Files that are there whole or not at all, and the JSON files that say what they are."""

import contextlib
import glob
import json
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file open for writing that takes the place of path when the block ends without an error.

    It is written beside path, flushed to the disk and renamed, so that whoever reads path, or
    breaks in at any moment, finds the old file or the new one. What killed processes left of
    theirs is removed first.
    """
    path = Path(path)
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale(path):
    """Remove the temporary files beside path of processes that were killed while they wrote to it, where the system
    says which processes there are."""
    if not os.path.exists("/proc/self"):
        return
    prefix = f".{path.name}."
    for file in path.parent.glob(f"{glob.escape(prefix)}*"):
        pid = file.name.removeprefix(prefix)
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):  # somebody else's
                file.unlink()


def read_json(path, name, schema):
    """The dict in a file whose "format" is name and "schema" is schema; ValueError if it has another or is malformed,
    OSError if it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != name:
        raise ValueError(f"{path} has no {name}: it was not written by sparsetrain")
    if found.get("schema") != schema:
        raise ValueError(f"{path} has schema {found.get('schema')!r} of {name}, this version reads {schema}")
    return found
