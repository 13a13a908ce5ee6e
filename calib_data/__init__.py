"""Data for compression: opening it, batching it, and the metrics measured on it."""
