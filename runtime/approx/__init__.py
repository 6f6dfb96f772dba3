"""Approximate reuse: what matches, and which of it is computed anew. Ints and numpy only."""
