"""The method in arrays: rewards, strategies, intervals and metrics. Arrays in, arrays out; no input or output."""
