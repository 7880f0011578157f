"""Plans in other trainers: one module for each, which imports its trainer and is imported only where it is used."""
