"""From one format to another, with verification; inspection and comparison."""
