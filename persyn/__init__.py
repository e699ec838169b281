"""PerSyn: route each prompt to the teacher whose response helps the student most, then generate."""
