"""Find the final answer of a response, parse it, and compare it with the reference."""
