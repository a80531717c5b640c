"""The built-in data set: scenes, their sentences, and the solver that checks them."""
