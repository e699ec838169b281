"""Kinds of routers: arrays in, arrays out. Each predicts the reward of every teacher's response to a prompt."""
