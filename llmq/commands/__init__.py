"""One module per command. Nothing heavy is imported before `run`."""
