"""The router: which teacher's response to a prompt will be rewarded most."""
