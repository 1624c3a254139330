"""Instruction data from a teacher: prompts, budgeted requests, parsed replies, and quality gates."""
