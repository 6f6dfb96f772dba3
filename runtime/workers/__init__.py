"""Spans of one zoo in several processes, behind one head."""
