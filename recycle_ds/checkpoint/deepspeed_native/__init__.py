"""DeepSpeed's native checkpoint folders (engine.save_checkpoint), read without DeepSpeed and without unpickling freely."""
