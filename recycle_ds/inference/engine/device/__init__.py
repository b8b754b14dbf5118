"""Steps that stay on the device: static buffers, CUDA graphs, paged attention, choice and drafting without host transfers."""
