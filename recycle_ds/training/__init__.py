"""Pretraining on a DeepSpeed engine: the loop sequences, small objects beside it do the rest."""
