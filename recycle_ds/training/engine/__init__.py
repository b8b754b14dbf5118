"""DeepSpeed's engine and code that works alike at every ZeRO stage: gradients, master weights, passes, pipeline."""
