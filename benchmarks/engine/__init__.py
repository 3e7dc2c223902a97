"""How fast the engine is: against the field's way, against its own formula, on an accelerator."""
