"""Candidate masks, their features, the policy, and the selection of pseudo-labels."""
