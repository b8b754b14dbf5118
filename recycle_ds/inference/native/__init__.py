"""What decoding multiplies with: packed weights, in compiled kernels on CPUs that have them and in PyTorch's operations."""
