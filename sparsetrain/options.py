"""The options of a subcommand, from one table: {name: (default, argparse's settings, help)}."""

import argparse


def add_parser(commands, name, options, **about):
    """Add the subcommand `name` with `options`; what is not given is left out of what the parser returns.

    A default of None is for the help to explain; of others, and of what is no flag, it is told at the end.
    """
    parser = commands.add_parser(name, argument_default=argparse.SUPPRESS, allow_abbrev=False, **about)
    for option, (default, settings, text) in options.items():
        if default is not None and not isinstance(default, bool):
            default = default if isinstance(default, (list, tuple)) else [default]
            text += f" (default: {' '.join(f'{d:g}' if isinstance(d, float) else str(d) for d in default)})"
        parser.add_argument(f"--{option}", **settings).help = text


def defaults(options):
    """{name as an attribute: default}."""
    return {name.replace("-", "_"): default for name, (default, _, _) in options.items()}
