"""Three skills on short texts, each in one frame: what is asked, then "Answer:"."""
