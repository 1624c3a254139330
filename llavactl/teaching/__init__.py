"""Asking a teacher for instruction data: what it is told, what it replies, and which of it is used."""
