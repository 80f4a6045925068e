"""Pure mathematics: tensors in, tensors out; no I/O, no communication, no globals."""
