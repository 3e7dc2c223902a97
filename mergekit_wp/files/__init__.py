"""Files of this package, read checked and written whole.

The score file and the circuit file, what a safetensors file may hold, names that appear only when
their content is complete, and text that strangers wrote.
"""
