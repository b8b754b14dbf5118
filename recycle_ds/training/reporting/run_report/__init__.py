"""The report of one or several runs as a single HTML file. Reads a run's files; imports neither torch nor the engine."""
