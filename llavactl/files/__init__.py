"""Reading and writing the files that others made: JSON, JSONL and tables, with file and line in every error."""
