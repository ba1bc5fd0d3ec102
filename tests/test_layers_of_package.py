"""A file of the package imports only from layers below its own, or from its own."""

import ast
from pathlib import Path

import pytest

import sparsetrain

PACKAGE = Path(sparsetrain.__file__).parent
LAYERS = [
    *("_kernels", "version", "checks", "files", "options", "rng"),
    *("heap", "arrays", "tape", "record", "normed", "sparse"),
    *("choices", "tiles", "winograd", "plans", "bands", "slabs", "ops", "sparse_gradient", "int8"),
    *("nn", "optim", "sparsity"),
    *(
        "backprop",
        "data",
        "train",
        "interchange",
        "bench",
        "profile",
        "__init__",
        "named",
        "commands",
        "cli",
        "__main__",
    ),
]
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def layer(name):
    """Where a file or module of the package stands: 0 is the lowest."""
    return LAYERS.index(name.split("/")[0].split(".")[0])


def imports(source):
    """The modules of the package that the source names in imports, without "sparsetrain."."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "sparsetrain":
                yield rest or "__init__"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    for name in imports((PACKAGE / file).read_text()):
        assert layer(name) <= layer(file), f"{file} imports {name}"


def test_all_kinds_of_imports_are_seen():
    source = "import sparsetrain as st\nfrom sparsetrain import nn\ndef f():\n    import sparsetrain.cli\n"
    assert list(imports(source)) == ["__init__", "nn", "cli"]
