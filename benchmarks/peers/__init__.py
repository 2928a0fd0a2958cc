"""What the fused operator is timed against, one file a library or way of writing the loop."""
