"""Reading and writing JSON, JSONL and tables, with file and line in every error."""
