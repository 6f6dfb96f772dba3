"""The engine that serves: loading, scheduling, stepping, documents, metrics."""
