"""Models: what they are asked, the engines that run them, and the host process each lives in."""
