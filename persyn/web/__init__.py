"""The console: the pages of `persyn web`. They show what the domain says; nothing is computed here."""
