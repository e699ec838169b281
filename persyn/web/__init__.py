"""The web console behind `persyn web`: pages that present read models, without computations of their own."""
