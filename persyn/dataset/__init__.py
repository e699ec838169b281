"""What a run leaves: its dataset in files, filtered, described and published."""
