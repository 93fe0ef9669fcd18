"""Everyday prompts, rules that stand in for a person, and instructions that say the same; see experiments/real.py."""
