"""How the server treats its clients: limits, keys, logs, streams, clients that go away."""
