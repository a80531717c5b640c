"""Sentences for instance masks: words, measurements, a generator, and a solver that is independent of it."""
