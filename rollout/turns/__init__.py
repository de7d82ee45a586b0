"""Conversations of several turns: what answers the policy between them, and one rollout's way through them."""
