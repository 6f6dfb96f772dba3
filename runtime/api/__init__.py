"""What may be asked of the engine, and the errors it answers with."""
