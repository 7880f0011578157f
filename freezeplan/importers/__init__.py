"""Plans from the files of other tools: one module for each tool, with a ``read`` that returns an ``Imported``."""
