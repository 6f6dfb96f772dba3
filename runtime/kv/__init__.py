"""Who owns which page of KV, and what of it is shared. Ids and counts only: no tensor, no engine."""
