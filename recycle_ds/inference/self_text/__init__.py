"""Text that a model writes itself, to train a recycle module on."""
