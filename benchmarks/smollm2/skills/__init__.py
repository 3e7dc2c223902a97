"""The three skills: items with a prompt, the answer to learn, and what checks an answer."""
