"""The subcommands of the command line, a file each: options, add_parser(), run()."""
