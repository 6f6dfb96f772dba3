"""Simulated clusters: the real scheduler and placement over workers whose times are computed."""
