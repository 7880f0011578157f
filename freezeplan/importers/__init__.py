"""Plans from the files of other tools: one module for each, ``read`` in each."""
