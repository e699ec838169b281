"""The method as array functions: rewards, strategies, intervals and routing metrics. No I/O."""
