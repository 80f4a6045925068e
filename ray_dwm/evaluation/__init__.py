"""What a trained LM is worth; runs on exported folders, in one process."""
