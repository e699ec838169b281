"""Language models: the engines that run them, the requests they answer, and the host process of each engine."""
