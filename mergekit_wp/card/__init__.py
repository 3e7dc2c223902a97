"""What a Hub visitor needs beside mergekit's own model card.

Sources and licences, what each expert contributed, copied score files, results.
"""
