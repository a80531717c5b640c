"""One thin command line per DVC stage: load params, load tables, call the library, save tables."""
