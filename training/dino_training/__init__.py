"""DINO pretraining and evaluation protocols will live here; there is no code yet."""
