"""The router: predict which teacher's response to a prompt will have the highest reward."""
