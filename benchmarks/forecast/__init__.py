"""Forecasts held against real runs, and the plan of models that are too large to run here."""
