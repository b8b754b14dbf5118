"""DeepSpeed's native checkpoint folders (engine.save_checkpoint), read without DeepSpeed and with restricted unpickling."""
