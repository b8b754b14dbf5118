"""The HTTP interface: requests and their checks, answers, errors. No engine, no network."""
