"""Speed, size and quality of finished graphs, and the report."""
