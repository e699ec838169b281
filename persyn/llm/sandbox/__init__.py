"""Run untrusted Python code in child processes behind walls: limits on resources, Landlock and seccomp."""
