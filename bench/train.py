"""Times whole training steps (SGD with momentum) against PyTorch, and its nets with SparseProp.

Also the memory that a step needs at its peak, in fresh processes, for the ResNets.
"""

from pathlib import Path

import cases
import common
import race

DENSE = ("torch", "torch-channels-last")


def main():
    sparsities = [0, 0.8, 0.9, 0.95, 0.99]
    peers = ["sparsetrain", *DENSE, "sparseprop"]
    parser = common.parser(__doc__, peers, sparsities, repeats=9, quick="lenet5")
    parser.add_argument("--all-sparse", action="store_true", help="also the first and the last layer")
    parser.add_argument(
        "--weights", nargs="+", type=Path, metavar="FILE", help="only a ResNet-20 with these weights, see cases.py"
    )
    options = common.parse(parser)
    chosen = common.chosen_cases(cases.net_cases(options.all_sparse), options)
    if options.weights:
        chosen = [cases.trained_case(path) for path in options.weights]
    results = race.run(chosen, options, memory_peers=("sparsetrain", *DENSE))
    headings = [
        "net", "batch", "sparsity", "ms a step", "images/s", "dense ms", "layout", "faster",
        "SparseProp ms", "its sparse layers", "faster",
    ]  # fmt: skip
    print("\n" + common.table(headings, [_row(result) for result in results]))
    memory = [_memory_row(result) for result in results if "memory" in result]
    if memory:
        headings = ["peak memory of a step", "sparsity", "MB", "dense MB", "share"]
        print("\n" + common.table(headings, memory))


def _row(result):
    case, peers = result["case"], result["peers"]
    seconds = peers.get("sparsetrain", {}).get("total")
    dense, sparseprop = race.fastest(result, DENSE), race.fastest(result, ("sparseprop",))
    layout = {"torch": "NCHW", "torch-channels-last": "NHWC"}.get(dense, "-")
    return [
        case["name"],
        str(case["batch"]),
        f"{case['sparsity']:g}",
        common.ms(seconds),
        f"{case['batch'] / seconds:.0f}" if seconds else "-",
        common.ms(peers[dense]["total"] if dense else None),
        layout,
        common.times(race.speedup(result, dense)),
        common.ms(peers[sparseprop]["total"] if sparseprop else None),
        _sparse_layers(peers[sparseprop]) if sparseprop else "-",
        common.times(race.speedup(result, sparseprop)),
    ]


def _sparse_layers(outcome):
    """How many layers SparseProp's modules took: the others were faster dense."""
    chosen = list(outcome["about"]["sparse_layers"].values())
    return f"{sum(which != 'dense' for which in chosen)} of {len(chosen)}"


def _memory_row(result):
    memory = {peer: found["step"] for peer, found in result["memory"].items() if found}
    ours = memory.get("sparsetrain")
    dense = min((memory[peer] for peer in DENSE if peer in memory), default=None)
    share = f"{ours / dense:.2f}" if ours and dense else "-"
    sizes = [f"{size / 1e6:.0f}" if size else "-" for size in (ours, dense)]
    return [result["case"]["name"], f"{result['case']['sparsity']:g}", *sizes, share]


if __name__ == "__main__":
    main()
