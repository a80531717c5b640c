"""Candidate masks, what the policy sees of them, the policy, and what it selects."""
