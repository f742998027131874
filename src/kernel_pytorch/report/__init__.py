"""What a plan says, for people and for programs: terminal tables, a live display, one HTML page, and JSON."""
