"""Times backward passes that use only some values of the output gradient, against PyTorch's and our own dense ones.

--sparsity is the share of values left out. The values are normal; the weights are dense. Single layers, or with
--nets whole training steps.
"""

from pathlib import Path

import cases
import common
import race

from sparsetrain.bench import shapes

DENSE = ("torch", "torch-channels-last")
METHODS = ("dithered", "dithered-8-bit", "resprop", "mem-aop", "top-k")


def main():
    peers = ["sparsetrain", *METHODS, *DENSE]
    parser = common.parser(__doc__, peers, [0.5, 0.75, 0.92, 0.98], repeats=9, quick="linear-1024-1024-b128")
    parser.add_argument("--shapes", type=Path, default=shapes.DEFAULT, help=f"default {shapes.DEFAULT}")
    parser.add_argument("--nets", action="store_true", help="training steps of whole nets")
    options = common.parse(parser)
    known = cases.net_cases() if options.nets else shapes.read(options.shapes)
    # Without the peak memory that train.py measures
    chosen = [{**case, "zeros": "gradient", "memory": False} for case in common.chosen_cases(known, options)]
    results = race.run(chosen, options)
    part = "step" if options.nets else "backward"
    headings = [
        "case",
        "zeros",
        "PyTorch ms",
        "own dense ms",
        "method",
        "zeros reached",
        "ms",
        "to PyTorch",
        "to own dense",
    ]
    headings += [] if options.nets else ["quantise", "weight gradient", "to own dense"]
    print("\n" + common.table(headings, [row for result in results for row in _rows(result, part, options.nets)]))


def _rows(result, part, nets):
    peers = {name: peer for name, peer in result["peers"].items() if "seconds" in peer}
    dense = min((peers[name]["seconds"][part] for name in DENSE if name in peers), default=None)
    own = peers.get("sparsetrain", {}).get("seconds", {})
    for name in METHODS:
        if name not in peers:
            continue
        seconds = peers[name]["seconds"]
        here = seconds[part]
        row = [
            result["case"]["name"],
            f"{result['case']['sparsity']:g}",
            common.ms(dense),
            common.ms(own.get(part)),
            name,
        ]
        row += [f"{peers[name]['about']['zeros']:.3f}", common.ms(here)]
        row += [common.times(dense and dense / here), common.times(own and own[part] / here)]
        if not nets:
            quantise = seconds.get("standard deviation", 0) + seconds.get("compress", 0) + seconds.get("sparsify", 0)
            weight = here - seconds.get("input gradient", 0)
            row += [f"{quantise / here:.1%}", common.ms(weight), common.times(own and own["weight gradient"] / weight)]
        yield row


if __name__ == "__main__":
    main()
