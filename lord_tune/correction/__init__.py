"""L R for a model that somebody has quantized already: reading its codes, and fitting what they left out."""
