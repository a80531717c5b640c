"""The built-in dataset: scenes, their sentences, and the solver that checks them."""
