"""One module a row, or a family of rows. Each has `run(bench) -> Row`."""
