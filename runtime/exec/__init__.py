"""From scheduled tokens to calls of engines, and the tensors they work on."""
