"""The only package that knows Ray and W&B: thin adapters around the engine."""
