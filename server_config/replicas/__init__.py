"""Replicas of a whole zoo on Ray Serve, behind one OpenAI endpoint (docs/cluster.md)."""
