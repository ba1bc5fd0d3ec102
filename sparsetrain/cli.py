"""The command line: `sparsetrain train`, `finetune`, `profile`, `bench` and `info`."""

import argparse
import os
import sys

import sparsetrain as st
from sparsetrain.commands import bench, info, profile, train
from sparsetrain.train import TrainingDiverged


def main(argv=None):
    """Run a command line; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    try:
        given = vars(_parser().parse_args(argv))
        command = given.pop("command")
        run = {
            "train": train.run,
            "finetune": train.finetune,
            "profile": profile.run,
            "bench": bench.run,
            "info": info.run,
        }
        return run[command](given)
    except SystemExit as end:  # --help, --version
        return end.code
    except KeyboardInterrupt:
        print("sparsetrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `sparsetrain info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into at exit
        return 0
    except (ValueError, OSError, MemoryError, TrainingDiverged) as error:
        print(f"sparsetrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser():
    parser = _Parser("sparsetrain", description="Train neural networks with sparse weights.")
    parser.add_argument("--version", action="version", version=f"sparsetrain {st.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | finetune | profile | bench | info")
    train.add_parsers(commands)
    for command in (profile, bench, info):
        command.add_parser(commands)
    return parser
