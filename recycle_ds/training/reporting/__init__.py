"""What a run reports: console, metrics, summary, plots, profiles."""
