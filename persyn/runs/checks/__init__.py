"""What would spoil a run, found before it begins: what this host has, what servers say, what each model is."""
