"""Reward-scoped GRPO for vision-language models that answer with evidence."""

__version__ = "0.1.0"
