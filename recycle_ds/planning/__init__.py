"""Which layouts of a run fit a cluster, what they hold, send and compute; and whether their shards tile the model."""
