"""What a run is: its settings, validated, and its name."""
