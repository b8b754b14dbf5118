"""Which layouts of a run fit a cluster, their memory, traffic and step time, and whether their shards tile the model."""
