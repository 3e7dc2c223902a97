"""Localisation against a truth that a compiler wrote: RASP programs compiled into weights."""
