"""Hand-made results of `sparsetrain bench`, for the tests beside this file."""

LIMITS = {
    "threads": 1,
    "fma_gflops": 100.0,
    "levels": [
        {"name": "L1d", "bytes": 32768, "read_gbs": 400.0, "update_gbs": 500.0},
        {"name": "L2", "bytes": 1 << 20, "read_gbs": 200.0, "update_gbs": 100.0},
        {"name": "memory", "bytes": None, "read_gbs": 10.0, "update_gbs": 20.0},
    ],
}


def layer(sparsity, forward, backward, what="layer", threads=1, batch=32, stored=None):
    """A measured 64 x 32 linear layer; forward and backward are lists of seconds."""
    stored = round((1 - sparsity) * 64 * 32) if stored is None else stored
    about = {"name": f"linear-64-32-b{batch}", "kind": "linear", "in": 64, "out": 32, "batch": batch}
    seconds = {"forward": forward, "backward": backward}
    return {"what": what, "sparsity": sparsity, **about, "stored": stored, "threads": threads, "seconds": seconds}


def net(sparsity, step):
    """A measured net; step is a list of seconds."""
    about = {"name": "lenet5", "batch": 64, "stored": round(1000 * (1 - sparsity))}
    return {"what": "net", "sparsity": sparsity, **about, "threads": 1, "seconds": {"step": step}}


def report(*cases, **changes):
    """What a file with these cases holds, as far as compare needs it."""
    machine = {"cpu": "one", "cpus": 1, "caches": {"L1d": 32768}}
    ran_with = {"threads": 1, "isa": "base", "repeats": 3, "budget": 1.0}
    whole = {"sparsetrain": "0.1.0", "machine": machine, "ran_with": ran_with, "limits": [LIMITS], "cases": cases}
    return {**whole, "load": {"before": None, "during": None}, "date": "2026-01-01", **changes}
