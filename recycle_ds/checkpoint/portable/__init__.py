"""The portable checkpoint: manifest, folder names, reading and writing."""
