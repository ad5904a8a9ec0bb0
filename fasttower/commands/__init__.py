"""What the command line does with a run that is there; each module has `run(arguments) -> exit code`."""
