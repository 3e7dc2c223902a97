"""What a score file says, for people and for programs: words, tables, JSON, figures, a page."""
