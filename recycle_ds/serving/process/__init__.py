"""The server as a process: its port, its ranks, its signals and its end."""
