"""What a Hub visitor needs beside mergekit's own model card."""
