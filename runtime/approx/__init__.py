"""Approximate reuse of KV: what was computed for the same words elsewhere (KVShare, arXiv 2503.16525).

    matching    runs of tokens that also occur in a donor's prompt
    selection   which positions take a donor's K and V (K rotated from its old to its new position), and which
                of those are computed anew all the same: in the prefill, and later, a few in each decode step
    first_pass  over what was taken, for selectors that must see it
    state       of one sequence, while it has such KV

What is taken was computed behind other words, so it is approximate: it never enters the exact tree, is never
a donor, and stays within its scope. Ints and numpy only.
"""
