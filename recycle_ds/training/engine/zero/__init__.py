"""DeepSpeed's optimizers behind one interface, `adapter.ZeroAdapter`: a file per ZeRO stage, chosen once in `choice`."""
