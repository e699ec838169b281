"""Final answers: where a response states one, what it is, and whether it is the reference's."""
