"""Bad steps, hangs, slow ranks, stop requests and the end of a batch job."""
