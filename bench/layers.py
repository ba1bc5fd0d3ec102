"""Times single layers, forward and backward, against PyTorch, SparseProp and SparseLab.

Backward is the gradients of input, weight and bias. Ours is timed as the layer runs inside a net,
on blocked arrays; "from NumPy" has the conversions of a layer that is called by itself.
"""

from pathlib import Path

import cases
import common
import race

from sparsetrain.bench import shapes

DENSE = ("torch", "torch-channels-last")
SPARSEPROP = ("sparseprop-batch", "sparseprop-on")


def main():
    sparsities = [0, 0.5, 0.8, 0.9, 0.95, 0.99]
    peers = ["sparsetrain", *DENSE, *SPARSEPROP, "sparselab", "torch-csr"]
    parser = common.parser(__doc__, peers, sparsities, repeats=15, quick="linear-1024-1024-b128")
    parser.add_argument("--shapes", type=Path, default=shapes.DEFAULT, help=f"default {shapes.DEFAULT}")
    options = common.parse(parser)
    chosen = common.chosen_cases(shapes.read(options.shapes), options)
    results = race.run(chosen, options)
    headings = [
        "layer", "sparsity", "fwd ms", "bwd ms", "GF/s fwd", "GF/s bwd", "from NumPy",
        "dense fwd", "dense bwd", "faster", "SparseProp fwd", "bwd", "faster",
    ]  # fmt: skip
    print("\n" + common.table(headings, [_row(result) for result in results]))


def _row(result):
    case = result["case"]
    ours = result["peers"].get("sparsetrain", {})
    dense, sparseprop = race.fastest(result, DENSE), race.fastest(result, SPARSEPROP)
    flops = cases.forward_flops(case)
    return [
        case["name"],
        f"{case['sparsity']:g}",
        *_both(ours),
        _gflops(flops, ours, "forward"),
        _gflops(2 * flops, ours, "backward"),
        common.ms(ours.get("total_beside")),
        *_both(result["peers"].get(dense, {})),
        common.times(race.speedup(result, dense)),
        *_both(result["peers"].get(sparseprop, {})),
        common.times(race.speedup(result, sparseprop)),
    ]


def _both(outcome):
    seconds = outcome.get("seconds", {})
    return common.ms(seconds.get("forward")), common.ms(seconds.get("backward"))


def _gflops(flops, outcome, part):
    seconds = outcome.get("seconds", {}).get(part)
    return "-" if seconds is None else f"{flops / seconds / 1e9:.0f}"


if __name__ == "__main__":
    main()
