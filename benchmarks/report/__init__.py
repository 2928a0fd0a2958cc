"""What the benchmark shows: its text, its Markdown tables and its pictures."""
