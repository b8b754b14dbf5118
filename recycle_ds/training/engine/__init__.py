"""DeepSpeed's engine and what hides the ZeRO stage: gradients, master weights, passes, pipeline."""
