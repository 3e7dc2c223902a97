"""How long a merge takes, beside mergekit's own TIES."""
